"""The guided run without a mouse: every control is reached by Tab, has a name, and obeys a key."""

import re

from test_guided_run import SMALL, cells, wait_for_state

# What Tab stops at, in the order of the page; what is disabled or hidden isn't stopped at.
STOPS = """() => {
    const stops = 'input, select, textarea, button, summary, [role=slider]'
    const all = [...document.querySelectorAll('.lb-live')].flatMap(
        panel => [...panel.querySelectorAll(stops)])
    const found = [...new Set(all)].filter(e => !e.disabled && e.offsetParent)
    found.forEach((element, number) => element.dataset.stop = number)
    return found.length
}"""
AT = "document.activeElement.dataset.stop"
NAMED = "textbox combobox spinbutton button radio checkbox img slider".split()


def open_guide(open_notebook, data):
    "The panels, with no training yet."
    changes = [f"data.train_file={data}", "output_dir=keys", *SMALL]
    changes += ["training.max_steps=400"]  # time enough to pause
    wanted = [c for c in cells(*changes) if c.startswith(("import", "guide."))]
    notebook = open_notebook(wanted)
    notebook.run_all(seconds=120)
    return notebook


def test_by_keyboard(open_notebook, lab, hundred):
    notebook = open_guide(open_notebook, hundred(lab[0]))
    page = notebook.page
    first = page.get_by_label("model", exact=True)
    page.wait_for_function(f"({STOPS})() > 35")
    count = page.evaluate(STOPS)
    assert count > 35
    first.focus()
    reached = {page.evaluate(AT)}
    for _ in range(2 * count):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(AT))
    assert {str(number) for number in range(count)} <= reached

    slider = page.locator(".lb-live [role=slider]").nth(1)  # model.max_length
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_text("'model.max_length=256'").first.wait_for()

    page.get_by_label("What would fit here?").or_(page.locator("button.lb-ask")).first.focus()
    while not page.evaluate("document.activeElement.matches('.lb-start')"):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for_state(notebook, "training")
    page.locator(".lb-live .lb-chart").first.wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.lb-pause')")
    page.keyboard.press("Space")
    wait_for_state(notebook, "paused")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for_state(notebook, "stopped")
    page.locator(".lb-live td >> text=exact match").wait_for()

    trees = [panel.aria_snapshot() for panel in page.locator(".lb-live").all()]
    shown = re.findall(r"(?m)^ *- (\w+)(.*)", "\n".join(trees))
    nameless = [kind for kind, rest in shown if kind in NAMED and not rest.startswith(' "')]
    assert sum(kind in NAMED for kind, _ in shown) > 50
    assert set(nameless) == {"slider"}  # of ipywidgets, which names none; labels stand beside them
