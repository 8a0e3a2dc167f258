"""The guided run in a real browser: with clicks only, by Run All, interrupted, and reopened.

LORABOOK_PICTURES=folder keeps a picture of each step.
"""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "nbs" / "guides" / "02_guided_run.ipynb"
SMALL = ["training.max_steps=30", "training.batch_size=4", "training.logging_steps=5"]
SMALL += ["training.gradient_accumulation_steps=1"]
STATE = ".lb-live .lb-state"


@pytest.fixture
def picture():
    "Keeps a picture of a notebook, if somebody wants to look at it."
    folder = os.environ.get("LORABOOK_PICTURES")

    def take(notebook, name, place=None, whole=True):
        if folder:
            shown = notebook.page.locator(place).first if place else notebook.page
            if place:
                shown.scroll_into_view_if_needed()
            notebook.page.wait_for_timeout(300)
            (notebook.page if whole else shown).screenshot(path=Path(folder, f"{name}.png"))

    return take


@pytest.fixture
def small_data(lab, hundred):
    "A file of a hundred conversations, in the folder of the notebooks."
    return hundred(lab[0])


def cells(*changes, first="", until=None):
    "The code cells of the guide but the install, with settings of a small run after the first."
    read = nbformat.read(NOTEBOOK, as_version=4).cells
    sources = [c.source for c in read if c.cell_type == "code" and "%pip" not in c.source]
    sources = sources[: sources.index(until)] if until else sources
    return [f"{sources[0]}\nguide.set(*{list(changes)})" if changes else sources[0], *sources[1:]]


def wait_for_state(notebook, *states, seconds=90):
    "Wait until the panel says one of these."
    wanted = ", ".join(f"{STATE}[data-state={state}]" for state in states)
    notebook.page.locator(wanted).wait_for(timeout=1000 * seconds)


def see(notebook, text):
    "Wait until a living panel shows this text: its plain copy, which is hidden, has it too."
    notebook.page.locator(".lb-live").get_by_text(text).first.wait_for()


def step(notebook):
    "The step that the panel says."
    return int(re.search(r"tep (\d+)", notebook.page.locator(STATE).inner_text())[1])


def type_into(notebook, label, text):
    "Type into a field, and leave it."
    field = notebook.page.get_by_label(label, exact=True)
    field.fill(text)
    field.press("Tab")


def since(notebook, action, *states):
    "Milliseconds from a click until the panel says one of these states, by the browser's clock."
    script = """([selector, wanted]) => new Promise(done => {
        const begun = performance.now()
        const look = () => {
            const now = document.querySelector('.lb-live .lb-state')?.dataset.state
            wanted.includes(now) ? done(performance.now() - begun) : setTimeout(look, 5)
        }
        document.querySelector(selector).click()
        look()
    })"""
    return notebook.page.evaluate(script, [action, list(states)])


def test_with_clicks_only(open_notebook, small_data, picture):
    wanted = [c for c in cells() if c.startswith(("import", "guide."))]
    notebook = open_notebook(wanted)
    notebook.run_all(seconds=120)
    page = notebook.page

    type_into(notebook, "Data", small_data)
    page.locator("button.lb-look").click()
    see(notebook, "100 rows, 0 repeats left out")
    page.locator("button.lb-next").click()
    see(notebook, "Row 2 of")
    type_into(notebook, "training.max_steps", "no")
    see(notebook, "Not taken over")
    picture(notebook, "5_wrong", "text=Not taken over")
    type_into(notebook, "training.max_steps", "400")
    type_into(notebook, "training.batch_size", "4")
    type_into(notebook, "training.gradient_accumulation_steps", "1")
    see(notebook, "All of this is valid")
    see(notebook, "'training.max_steps=400'")
    page.get_by_label("rank r").select_option("8")
    see(notebook, "'lora.r=8'")
    for number, name in enumerate(("model", "data", "trained", "memory", "settings"), 1):
        picture(notebook, f"{number}_{name}", f".lb-live h3 >> text={number}. ")

    page.locator("button.lb-start").click()
    wait_for_state(notebook, "training")
    assert page.locator("button.lb-start").is_disabled()
    page.locator(".lb-live .lb-chart").first.wait_for()
    assert since(notebook, "button.lb-pause", "paused") < 3000
    held = step(notebook)
    picture(notebook, "6_paused", ".lb-live h3 >> text=6. ")
    page.wait_for_timeout(1500)
    assert step(notebook) == held
    page.locator("button.lb-pause").click()
    wait_for_state(notebook, "training")
    page.wait_for_timeout(1000)
    assert step(notebook) > held
    assert since(notebook, "button.lb-stop", "stopping", "finishing", "stopped") < 1000
    assert page.locator("button.lb-stop").is_disabled()
    folder = notebook.path.parent / "outputs" / "guided" / "my_custom_llm_builtin"
    for _ in range(30):
        if (folder / "run.yaml").exists():
            break
        page.wait_for_timeout(100)
    assert (folder / "adapter_model.safetensors").exists()  # within 3 s
    wait_for_state(notebook, "stopped")
    picture(notebook, "6_training", ".lb-live h3 >> text=6. ")

    page.locator(".lb-live td >> text=exact match").wait_for()
    picture(notebook, "7_better", ".lb-live h3 >> text=7. ")
    page.get_by_placeholder("Your question").fill("My knee hurts since Monday.")
    page.get_by_placeholder("Your question").press("Tab")
    page.locator(".lb-live button.lb-ask >> text=/^Ask$/").click()
    see(notebook, "My knee hurts since Monday.")
    page.wait_for_timeout(3000)
    picture(notebook, "7_chat", ".lb-live button.lb-forget")
    picture(notebook, "8_home", ".lb-live h3 >> text=8. ")
    assert (folder / "README.md").exists()

    nbformat.validate(notebook.save())
    again = open_notebook(notebook.path, kernel=False)
    shown = again.page.locator(".lb-copy")
    assert shown.count() == 8 and not again.page.locator(".lb-live").count()
    parts = "100 rows", "trainable params", "Fits", "Stopped after", "exact match", "run.yaml"
    for part in parts:
        shown.get_by_text(part).locator("visible=true").first.wait_for()
    assert shown.locator("img[alt^='Loss']").is_visible()
    assert not again.page.get_by_text("Error displaying widget").count()
    picture(again, "9_reopened", ".lb-copy img[alt^='Loss']")


def test_run_all(open_notebook, small_data, picture):
    notebook = open_notebook(cells(f"data.train_file={small_data}", "output_dir=all", *SMALL))
    assert not notebook.page.locator(".lb-live").count()
    notebook.start()
    wait_for_state(notebook, "training")
    outputs = notebook.finish(seconds=180)
    figures = json.loads((notebook.path.parent / "all" / "metrics.json").read_text())
    assert figures["steps"] == 30 and figures["after"]["loss"] < figures["before"]["loss"]
    assert outputs[-2].data["text/plain"] == "True"
    wait_for_state(notebook, "finished")
    assert not notebook.page.locator(".lb-copy").locator("visible=true").count()
    picture(notebook, "6_finished", ".lb-live:has(h3:has-text('6. '))", whole=False)
    saved = notebook.save()
    nbformat.validate(saved)
    for cell in saved.cells:
        shown = [output for output in cell.outputs if "text/html" in output.get("data", {})]
        assert shown or not cell.source.startswith("guide.")


def test_interrupt(open_notebook, small_data):
    long = "training.max_steps=400"
    notebook = open_notebook(cells(f"data.train_file={small_data}", "output_dir=cut", *SMALL, long))
    notebook.start()
    wait_for_state(notebook, "training")
    notebook.page.wait_for_timeout(1000)
    notebook.interrupt()
    notebook.finish(error="KeyboardInterrupt", seconds=30)
    wait_for_state(notebook, "stopped")
    folder = notebook.path.parent / "cut" / "my_custom_llm_builtin"
    assert (folder / "adapter_model.safetensors").exists()
