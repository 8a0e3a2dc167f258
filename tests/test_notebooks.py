"""What tests/notebooks.py promises, shown on a button."""

import pytest
from notebooks import wait_until

BUTTON = """
import ipywidgets as widgets
button, number, text = widgets.Button(description="Press"), widgets.IntSlider(), widgets.HTML("no")
for widget, name in zip((button, number, text), ("press", "number", "text")):
    _ = widget.add_class(f"lb-{name}")
button.on_click(lambda _: setattr(text, "value", f"pressed at {number.value}"))
widgets.VBox([button, number, text])
"""
VERSIONS = """
import ipykernel, ipywidgets, IPython
[module.__version__ for module in (ipykernel, ipywidgets, IPython)]
"""


def test_kernel(kernel, request):
    colab = "colab" in request.node.name
    assert (kernel.evaluate(VERSIONS) == ["6.17.1", "7.7.1", "7.34.0"]) == colab
    assert bool(kernel.subshell) != colab
    (shown,) = kernel.execute(BUTTON)
    assert "application/vnd.jupyter.widget-view+json" in shown.data
    text = kernel.find("lb-text")
    assert kernel.state(text)["value"] == "no"
    kernel.set_value(kernel.find("lb-number"), 7)
    kernel.send_click(kernel.find("lb-press"))
    wait_until(lambda: kernel.state(text)["value"] == "pressed at 7")
    assert kernel.evaluate("number.value, text.value") == (7, "pressed at 7")


def test_cells_of_a_kernel(kernel):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        kernel.execute("1 / 0")
    kernel.execute("1 / 0", error="ZeroDivisionError")
    with pytest.raises(AssertionError):
        kernel.execute("1 + 1", error="ZeroDivisionError")
    kernel.execute("handle = display('before', display_id=True)")
    kernel.execute("handle.update('after')")
    assert [shown.data["text/plain"] for shown in kernel.displays.values()] == ["'after'"]
    cell = kernel.execute_async("import time; print('begun', flush=True); time.sleep(60)")
    wait_until(lambda: kernel.read() or kernel.outputs.get(cell))
    kernel.interrupt()
    assert kernel.finish(cell, error="KeyboardInterrupt", seconds=5)[0].text == "begun\n"


def test_browser(open_notebook, tmp_path):
    notebook = open_notebook([BUTTON, "2 * 21"])
    assert notebook.run_all()[-1].data["text/plain"] == "42"
    notebook.click("button.lb-press")
    notebook.page.get_by_text("pressed at 0").wait_for()
    notebook.screenshot(tmp_path / "button.png")
    assert (tmp_path / "button.png").read_bytes()[1:4] == b"PNG"
    saved = notebook.save()
    assert saved.cells[1].outputs[0].data["text/plain"] == "42"

    again = open_notebook(notebook.path, kernel=False)
    again.page.get_by_text("VBox(children=(Button(description='Press'").wait_for()
    assert not again.page.locator("button.lb-press").count()
    assert again.outputs() == [*saved.cells[0].outputs, *saved.cells[1].outputs]


def test_browser_interrupts(open_notebook):
    notebook = open_notebook(["print('begun', flush=True)", "import time; time.sleep(60)"])
    notebook.start()
    notebook.page.get_by_text("begun", exact=True).wait_for()
    notebook.interrupt()
    assert notebook.finish(error="KeyboardInterrupt", seconds=5)


def test_browser_notices(open_notebook):
    "Errors of a page, and requests to others."
    notebook = open_notebook(["'quiet'"])
    assert notebook.run_all() and not notebook.problems
    notebook.page.evaluate("setTimeout(() => { throw new Error('lost') })")
    notebook.page.evaluate("console.error('loud')")
    notebook.page.evaluate("fetch('https://example.org/x').catch(() => null)")
    notebook.page.evaluate("new WebSocket('wss://example.org/y')")
    known = "lost", "loud", "asks https://example.org/x", "asks wss://example.org/y"
    found = lambda: all(any(one in problem for problem in notebook.problems) for one in known)
    wait_until(lambda: notebook.page.wait_for_timeout(50) or found(), 5)
    notebook.problems.clear()
