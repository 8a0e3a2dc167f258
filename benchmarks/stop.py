"""How soon a Stop is felt, and the adapter saved.

    python benchmarks/stop.py     writes results/stop_latency.json

A click is sent as JupyterLab sends it, over the kernel protocol, to a kernel of each stack in which
a cell awaits the session and another cell stands behind it. The run is the built-in one with its
default training settings (eight micro-batches of four to a step) on a hundred conversations. From
the click on, in seconds: until the panel says so, until the training has ended, until the adapter
is saved. Kernel and client share the clock of the machine.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the kernels inherit it
from common import machine, median, save

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
from notebooks import STACKS, kernel_of, wait_until  # noqa: E402

CLICKS = 10
RUN = """
import time
from lorabook import RunConfig, Session, TrainingView
changes = "data.train_file=hundred.jsonl", "output_dir=run{i}"
session, times = Session(RunConfig().override(*changes), echo=False), {{}}
session.listen(lambda event: times.setdefault(event.text, time.monotonic()))
TrainingView(session)
"""
VERSIONS = """
import ipykernel, ipywidgets
{module.__name__: module.__version__ for module in (ipykernel, ipywidgets)}
"""


def said(kernel):
    """What the last panel says: (state, step)."""
    kernel.read()
    texts = [str(state.get("value", "")) for state in kernel.models.values()]
    head = [text for text in texts if "data-state=" in text][-1]
    step = re.search(r"step (\d+)", head)
    return re.search('data-state="(.*?)"', head)[1], int(step[1]) if step else 0


def click(kernel, i):
    """Start a session, stop it by a click after some steps: seconds until this and that."""
    kernel.execute(RUN.format(i=i))
    button = kernel.find("lb-stop")
    cell, behind = kernel.execute_async("await session"), kernel.execute_async("1")
    wait_until(lambda: said(kernel)[0] == "training" and said(kernel)[1] >= 2, 120)
    time.sleep(0.13 * i)  # not always at the same place of a step
    load, asked = os.getloadavg()[0], time.monotonic()
    kernel.send_click(button)
    wait_until(lambda: said(kernel)[0] not in ("training", "paused"))
    felt = time.monotonic() - asked
    kernel.finish(cell), kernel.finish(behind)
    times, step = kernel.evaluate("times, session.step")
    return {
        "felt": felt,
        "ended": times["finishing"] - asked,
        "saved": times["test"] - asked,
        "step": step,
        "load": round(load, 2),
    }


def main():
    stacks = {}
    for stack in STACKS:
        with tempfile.TemporaryDirectory() as folder, kernel_of(stack, Path(folder)) as kernel:
            lines = (ROOT / "lorabook/assets/intake_notes.jsonl").read_text(encoding="utf-8")
            rows = "\n".join(lines.splitlines()[:100])
            Path(folder, "hundred.jsonl").write_text(rows, encoding="utf-8")
            versions = kernel.evaluate(VERSIONS)
            runs = [click(kernel, i) for i in range(CLICKS)]
        names = "felt", "ended", "saved"
        stacks[stack] = {
            "versions": versions,
            "medians": {name: median(runs, name) for name in names},
            "largest": {name: max(run[name] for run in runs) for name in names},
            "runs": runs,
        }
        print(stack, stacks[stack]["medians"], stacks[stack]["largest"], flush=True)
    save(
        "stop_latency",
        {
            "command": "python benchmarks/stop.py",
            "machine": machine("torch", "transformers"),
            "unit": "seconds from the click",
            "stacks": stacks,
        },
    )


if __name__ == "__main__":
    main()
