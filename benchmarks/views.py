"""What the panel of a training costs.

    python benchmarks/views.py     writes results/views_cpu.json

The built-in run with the default config (100 steps, or as many as --steps says), in a kernel as
JupyterLab starts one, whose messages are read and taken apart as they come; with the panel and
without it, in turns, each in a kernel of its own. Three figures: the seconds that the panel held
the session's thread, as a share of those of the training (without what other threads of the kernel
do for it); the processor's time for the whole kernel during the training, with the panel as a ratio
to that without it; and the same ratio of the seconds on the clock, which other work on the machine
disturbs most. One thread for the arithmetic, so that the kernel's other threads have a core.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the kernels inherit it
from common import machine, median, save

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
from notebooks import kernel_of  # noqa: E402

RUN = """
from lorabook import RunConfig, Session, TrainingView
import time
session = Session(RunConfig().override("training.max_steps={steps}"), echo=False)
view, marks, draws = TrainingView(session) if {view} else None, {{}}, []
def mark(event):
    marks.setdefault(event.text, (time.process_time(), view.seconds if view else 0.0))
session.listen(mark)
if view:
    draw = view.draw
    view.draw = lambda: (draws.append(session.phase), draw())
view
"""
FIGURES = """{
    "train_seconds": session.result.seconds["train"],
    "steps": session.step,
    "processor_seconds": marks["save"][0] - marks["train"][0],
    "view_seconds": marks["save"][1] - marks["train"][1],
    "drawings": draws.count("train"),
}"""
REPEATS = 3


def run(view, steps):
    """One run in a kernel of its own."""
    with tempfile.TemporaryDirectory() as folder, kernel_of("new", Path(folder)) as kernel:
        kernel.execute(RUN.format(view=view, steps=steps))
        load = os.getloadavg()[0]
        kernel.execute("result = await session", seconds=1800)
        return {"view": view, "load_before": round(load, 2), **kernel.evaluate(FIGURES)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    steps, runs = parser.parse_args().steps, []
    for i in range(2 * REPEATS):
        runs.append(run(i % 2 == 0, steps))
        print(runs[-1], flush=True)
    with_view, without = ([r for r in runs if r["view"] == wanted] for wanted in (True, False))
    for found in with_view:
        found["share"] = found["view_seconds"] / found["train_seconds"]
    ratio = lambda key: median(with_view, key) / median(without, key)
    result = {
        "command": f"python benchmarks/views.py --steps {steps}",
        "machine": machine("torch", "transformers", "ipykernel", "ipywidgets"),
        "share_of_the_thread": median(with_view, "share"),
        "ratio_of_processor_time": ratio("processor_seconds"),
        "ratio_of_seconds": ratio("train_seconds"),
        "runs": runs,
    }
    save("views_cpu", result)
    print({key: value for key, value in result.items() if key.startswith(("share", "ratio"))})


if __name__ == "__main__":
    main()
