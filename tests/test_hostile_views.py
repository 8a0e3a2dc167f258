"""Text of strangers in every panel, in a real browser: all of it is shown, nothing of it acts.

Not in the panels, not in the plain copies of a notebook that is opened again, trusted or not.
"""

import ast
import json
import re

import nbformat
from conftest import ROOT
from hostile import ACT, TEXTS, hostile_file, hostile_rows
from notebooks import PANEL

MEGABYTES = 3  # of a saved notebook, at most
NAME = f'<img class=hostile src=x onerror="{ACT}">'  # of a file or a folder: it has no slash
ACTED = """[window.hostile, document.title == 'hostile',
    document.querySelectorAll('.hostile').length,
    document.body.textContent.includes('Error displaying widget')]"""
CLICK = """([button, text, before]) => new Promise((done, failed) => {
    const begun = performance.now()
    const now = () => document.querySelector(text)?.innerText
    const look = () => {
        const passed = performance.now() - begun
        if (now() !== before) done(passed)
        else if (passed > 10000) failed(new Error(`nothing came of ${button}`))
        else setTimeout(look, 5)
    }
    document.querySelector(button).click()
    look()
})"""
# Playwright's own search for a text takes seconds in these pages.
SAYS = "([place, text]) => document.querySelector(place)?.textContent.includes(text)"
IMPORTS = f"""import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import lorabook
from hostile import TEXTS
from lorabook.config import RunConfig
NAME = {NAME!r}"""


def check(notebook):
    "Nothing has acted, and nothing was left out because it could not be drawn."
    acted = notebook.page.evaluate(ACTED)
    assert acted == [None, False, 0, False], acted


def click(notebook, button, text):
    "Click, and wait until a text has changed: within a second, by the browser's clock."
    before = notebook.page.locator(text).first.inner_text()
    passed = notebook.page.evaluate(CLICK, [button, text, before])
    assert passed < 1000, f"{button}: {passed:.0f} ms"


def check_saved(notebook, open_notebook, copies):
    "The file is small, and what it shows to others acts as little."
    nbformat.validate(notebook.save())
    size = notebook.path.stat().st_size
    assert size < MEGABYTES * 1e6, f"{size:,} bytes"
    again = open_notebook(notebook.path, kernel=False)
    assert again.page.locator(".lb-copy").count() == copies
    check(again)
    again.page.evaluate(f"{PANEL}.content.widgets.forEach(cell => cell.model.trusted = true)")
    again.page.wait_for_timeout(500)
    assert again.page.evaluate(f"{PANEL}.content.widgets.every(cell => cell.model.trusted)")
    assert again.page.locator(".lb-copy").count() == copies
    check(again)


def test_guide(open_notebook, tmp_path):
    rows, short = (tmp_path / f"{name} {NAME}.jsonl" for name in ("all", "short"))
    hostile_file(rows)
    few = [row for row, text in zip(hostile_rows(), TEXTS.values()) if len(text) < 200]
    short.write_text("\n".join(map(json.dumps, few)))
    (tmp_path / NAME).symlink_to(ROOT / "lorabook/assets/model")
    settings = {
        "model": {"name": str(tmp_path / NAME), "max_length": 1024},
        "data": {"train_file": str(rows), "split": [0.8, 0.1, 0.1]},
        "training": {"max_steps": 2, "batch_size": 1, "gradient_accumulation_steps": 1},
        "output_dir": str(tmp_path / f"out {NAME}"),
    }
    settings_short = settings | {"data": settings["data"] | {"train_file": str(short)}}
    walks = {"walk": settings, "other": settings_short}
    cells = [
        IMPORTS,
        *(f"{name} = lorabook.guide(RunConfig.from_dict({v!r}))" for name, v in walks.items()),
        *(f"walk.{name}" for name in ("model", "data", "trained", "memory", "settings")),
        "walk._data.row.add_class('lb-row-text'), walk._data.chooser.add_class('lb-row-chooser')",
        "other.training",
        "result = await other.session\nresult",
        "other.better",
        "other.home",
        "[step.fault.value for w in (walk, other) for s in w.steps.values() for step in s.views]",
    ]
    notebook = open_notebook(cells)
    outputs = notebook.run_all(seconds=120)
    assert set(ast.literal_eval(outputs[-1].data["text/plain"])) == {""}
    check(notebook)
    page = notebook.page
    row = ".lb-row-text p:has(b)"
    count = int(re.search(r"Row 1 of (\d+)", page.locator(row).first.inner_text())[1])
    assert count > 15
    for _ in range(count - 1):
        click(notebook, ".lb-row-chooser .lb-next", row)
        check(notebook)
    check_saved(notebook, open_notebook, 8)


VIEWS = """
from types import SimpleNamespace
import lorabook.widgets.chat
from lorabook.errors import TrainingError
from lorabook.infer.evaluate import Scores
from lorabook.infer.generate import Answer
from lorabook.run import RunResult
from lorabook.train.callbacks import HistoryCallback
from lorabook.widgets.compare import CompareView
from lorabook.widgets.data import DataView
from lorabook.widgets.guide import ModelView
from lorabook.widgets.memory import MemoryView
from lorabook.widgets.session import Event, Session
from lorabook.widgets.settings import ConfigView
from lorabook.widgets.training import TrainingView

texts = list(TEXTS.values())
cfg = RunConfig.from_dict({
    "model": {"name": NAME},
    "data": {"train_file": NAME, "system_prompt": " ".join(texts)[:3000]},
    "training": {"run_name": NAME},
    "output_dir": NAME,
})
view = DataView(cfg=cfg)
view
---
ModelView(cfg)
---
MemoryView(cfg)
---
settings = ConfigView(cfg)
settings.inputs["model.revision"].add_class("revision")
settings.inputs["lora.r"].value = NAME
settings.status.add_class("status")
settings
---
session = Session(cfg)
session.state, session.step, session.steps, session.log = "failed", 1, 2, [*texts]
session.error = TrainingError(*texts[:3])
session.events += [Event(0.0, "fault", text) for text in texts]
session._samples = SimpleNamespace(rows=[(1, text, text) for text in texts])
history = HistoryCallback()
history.rows += [{"step": step, "loss": 1.0, "eval_loss": 2.0} for step in (1, 2)]
session.run = SimpleNamespace(trainer=True, history=history)
TrainingView(session)
---
def scores(answers):
    rows = [([{"role": t, "content": t}], t, Answer(a, False)) for t, a in zip(texts, answers)]
    return Scores.from_answers(rows, [(1.0, 1)] * len(rows))

ones = {k: None for k in ("memory", "trainable", "seconds")}
tested = scores(texts[::-1]), scores([t + NAME for t in texts])
result = RunResult(NAME, *tested, history=history, config=cfg, **ones)
compare = CompareView(result)
compare.shown.add_class("compared")
compare.panel.add_class("comparing")
compare
---
def chat(model, tokenizer, message, history, on_text, **options):
    for text in texts:
        on_text(text)
    return Answer("".join(texts), False)

lorabook.widgets.chat.chat = chat
talk = lorabook.widgets.chat.ChatView(None, None)
talk.talk.add_class("talked")
talk"""


def test_views(open_notebook):
    first, *others = VIEWS.split("\n---\n")
    notebook = open_notebook([IMPORTS + first, *others])
    notebook.run_all(seconds=60)
    check(notebook)
    page = notebook.page
    page.wait_for_function(SAYS, arg=[".status", "Not taken over: lora.r"])
    for _ in TEXTS:
        click(notebook, ".comparing .lb-next", ".compared")
        check(notebook)
    short = " ".join(text for text in TEXTS.values() if len(text) < 2000)
    for number, asked in enumerate((short, TEXTS["long"][:5000]), 1):
        question = page.locator("[placeholder='Your question']")
        question.fill(asked)
        question.press("Enter")
        page.wait_for_function(SAYS, arg=[f".talked > :nth-child({number}) i", "did not end"])
        check(notebook)
    check_saved(notebook, open_notebook, 7)
