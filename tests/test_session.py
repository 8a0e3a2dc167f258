"""A session and its panel: in kernels of both stacks, and in a plain script."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from notebooks import wait_until

SMALL = """
import time
from lorabook import RunConfig, Session, TrainingView

def small(name, steps=400):
    wanted = ["data.train_file=forty.jsonl", f"output_dir={name}", f"training.max_steps={steps}"]
    wanted += ["training.batch_size=4", "training.gradient_accumulation_steps=1"]
    return Session(RunConfig().override(*wanted, "training.logging_steps=5"), echo=False)

def panel(name, steps=400):
    session = small(name, steps)
    return session, TrainingView(session)
"""
AWAIT = """
print("before")
result = await session
print("after", result.adapter_dir)
"""


@pytest.fixture
def rows(tmp_path):
    "Forty conversations, in the folder of the kernel."
    lines = (ROOT / "lorabook/assets/intake_notes.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "forty.jsonl").write_text("\n".join(lines[:40]), encoding="utf-8")


class Panel:
    "A `TrainingView` in a kernel, as somebody sees it who has only what the kernel sends."

    def __init__(self, kernel, cell):
        known = set(kernel.models)
        (self.widget, self.copy) = kernel.execute(cell)
        find = lambda name: wait_until(lambda: [i for i in new() if name in classes(i)])[-1]
        new = lambda: kernel.read() or set(kernel.models) - known
        classes = lambda i: kernel.state(i)["_dom_classes"]
        self.kernel, self.root = kernel, find("lb-live")
        self.buttons = {name: find(f"lb-{name}") for name in ("start", "pause", "stop")}

    def text(self, model=None):
        "The text of all that the panel is made of."
        state = self.kernel.state(model or self.root)
        parts = [self.text(i.removeprefix("IPY_MODEL_")) for i in state.get("children", [])]
        return "\n".join([str(state.get("value", "")), *parts])

    @property
    def state(self):
        "Of the session."
        return re.search('data-state="(.*?)"', self.text())[1]

    @property
    def step(self):
        "The step it says."
        return int((re.search(r"step (\d+)", self.text()) or "00")[1])

    def click(self, name, *states, seconds=30):
        "Press a button, and wait until the panel says one of the states; returns the seconds."
        asked = time.monotonic()
        self.kernel.send_click(self.buttons[name])
        wait_until(lambda: self.state in states, seconds)
        return time.monotonic() - asked


def replies(kernel, cells):
    "How the kernel answers to cells: ok, error or aborted."
    found = {}
    while set(cells) - set(found):
        reply = kernel.client.get_shell_msg(timeout=30)
        found[reply["parent_header"].get("msg_id")] = reply["content"].get("status")
    return [found[cell] for cell in cells]


def printed(outputs):
    "What a cell has printed."
    return "".join(output.text for output in outputs if output.output_type == "stream")


def advice(kernel):
    "What a session says first, in a kernel that hears clicks too late."
    kernel.execute("from lorabook.widgets.kernel import check_kernel")
    said = kernel.evaluate("check_kernel() or ''")
    return f"{said}\n" if said else ""


def adapter(folder):
    "Whether an adapter is there, whole."
    return (folder / "my_custom_llm_builtin" / "run.yaml").exists()


def test_clicks_while_a_cell_awaits(kernel, rows, tmp_path):
    kernel.execute(SMALL)
    panel = Panel(kernel, "session, view = panel('run')\nview")
    other = Panel(kernel, "second, other = panel('other')\nother")
    cell = kernel.execute_async(AWAIT)
    after = [kernel.execute_async(f"print({i}, session.state)") for i in range(3)]
    wait_until(lambda: panel.state == "training" and panel.step >= 5)

    panel.click("pause", "paused")
    held = panel.step
    panel.click("start", "paused")
    wait_until(lambda: "This session has been started before" in panel.text())
    other.click("start", "new")
    wait_until(lambda: "Another session of this process is at work" in other.text())
    time.sleep(0.3)
    assert (panel.state, panel.step, other.state) == ("paused", held, "new")
    panel.click("pause", "training")
    wait_until(lambda: panel.step > held)
    assert cell not in kernel.idle and not any(i in kernel.outputs for i in after)

    asked = time.monotonic()
    assert panel.click("stop", "stopping", "finishing", "stopped") < 1
    wait_until(lambda: adapter(tmp_path / "run"), 3)
    assert time.monotonic() - asked < 3
    folder = "run/my_custom_llm_builtin"
    assert printed(kernel.finish(cell)) == f"before\n{advice(kernel)}after {folder}\n"
    assert [printed(kernel.finish(i)) for i in after] == [f"{i} stopped\n" for i in range(3)]
    assert kernel.evaluate("session.result is result, str(result.adapter_dir)") == (True, folder)
    assert replies(kernel, [cell, *after]) == ["ok"] * 4

    steps = kernel.evaluate("session.step")
    assert held < steps < 400 and panel.state == "stopped"
    for copy in (panel.copy, kernel.displays[next(iter(kernel.displays))]):
        page = copy.data["text/html"]
        assert "data:image/png" in page and f"Stopped after {steps} of 400 steps" in page
    assert len(panel.widget.data["text/plain"]) < 100
    assert "<img" not in other.copy.data["text/html"]


def test_interrupt_while_a_cell_awaits(kernel, rows, tmp_path):
    kernel.execute(SMALL)
    panel = Panel(kernel, "session, view = panel('run')\nview")
    cell = kernel.execute_async(AWAIT)
    after = [kernel.execute_async("print('this ran')") for _ in range(2)]
    wait_until(lambda: panel.state == "training" and panel.step >= 5)
    asked = time.monotonic()
    kernel.interrupt()
    outputs = kernel.finish(cell, error="KeyboardInterrupt")
    assert time.monotonic() - asked < 3 and adapter(tmp_path / "run")
    assert printed(outputs) == "before\n" + advice(kernel)
    assert replies(kernel, [cell, *after]) == ["error", "aborted", "aborted"]
    assert not any(kernel.outputs.get(i) for i in after)
    assert kernel.evaluate("session.wait() is session.result") is True
    wait_until(lambda: panel.state == "stopped")
    assert kernel.evaluate("session.state, session.result is None") == ("stopped", False)


BROKEN = """
def always():
    raise ValueError("no ink")

def sometimes(draw=TrainingView(session).draw, count=[0]):
    count[0] += 1
    if count[0] % 2:
        raise OSError("a fault that comes and goes")
    draw()

for draw in (always, sometimes):
    broken = TrainingView(session, pause_between=0)
    broken.draw = draw
"""


def test_an_idle_kernel_and_views_that_fail(kernel, rows, tmp_path):
    kernel.execute(SMALL)
    panel = Panel(kernel, "session, view = panel('run')\nview")
    panel.click("start", "training")
    wait_until(lambda: panel.step >= 5)
    assert panel.click("stop", "stopping", "finishing", "stopped") < 1
    wait_until(lambda: adapter(tmp_path / "run"), 3)
    wait_until(lambda: panel.state == "stopped")

    panel = Panel(kernel, "session, view = panel('whole', 40)\nview")
    kernel.execute(BROKEN)
    panel.click("start", "finished", seconds=60)
    assert kernel.evaluate("session.step, session.error") == (40, None)
    assert "no ink" in panel.text() and "comes and goes" in panel.text()
    ended = lambda: "Finished after 40 steps" in panel.copy.data["text/html"]
    wait_until(lambda: kernel.read() or ended())
    assert "data:image/png" in panel.copy.data["text/html"]


SCRIPT = """
import asyncio, json

def steps(session):
    while session.step < 2:
        time.sleep(0.01)
    print("trains", flush=True)

def interrupted(wait):
    try:
        wait()
    except KeyboardInterrupt:
        return True

async def awaited(session):
    return await session

if __name__ == "__main__":
    found = {}
    for name, wait in {
        "wait": lambda session: session.start().wait(),
        "await": lambda session: asyncio.run(awaited(session)),
    }.items():
        session = small(name)
        threading.Thread(target=steps, args=[session]).start()
        found[name] = interrupted(lambda: wait(session)), session.wait() is session.result
        found[name] += session.state, session.step < 400
    done = small("done", 4)
    found["done"] = asyncio.run(awaited(done)) is done.result, done.state
    print(json.dumps(found))
"""


def test_a_plain_script(rows, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import threading\n{SMALL}\n{SCRIPT}", encoding="utf-8")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, script], cwd=tmp_path, **pipes) as process:
        for _ in range(2):
            assert process.stdout.readline() == "trains\n"
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    stopped = [True, True, "stopped", True]
    assert json.loads(out) == {"wait": stopped, "await": stopped, "done": [True, "finished"]}, err
    assert all(adapter(tmp_path / name) for name in ("wait", "await", "done"))
    assert "registerClient" not in err and "Traceback" not in err
