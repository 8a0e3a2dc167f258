"""The pictures of the README: python tools/pictures.py [tokens | plan | comparison | guided_run]

Most are saved outputs of the guides; the guided run is played in a browser, by its test, which
takes a minute or two. A browser is installed first where there is none.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import browser
import nbformat

ROOT = Path(__file__).resolve().parent.parent
IMAGES, GUIDES = ROOT / "nbs" / "images", ROOT / "nbs" / "guides"
OUTPUTS = {  # name: (guide, what the last line of the cell begins with, size of the window)
    "tokens": ("01_quickstart", "show_tokens(", "900,215"),
    "plan": ("01_quickstart", "plan_memory(", "900,360"),
    "comparison": ("01_quickstart", "result\n", "1000,1000"),
}
GUIDED = ROOT / "tests" / "test_guided_run.py", "test_with_clicks_only", "6_training.png"
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 20px; background: #fff; color: #1f2328 }
table { border-collapse: collapse; margin: .5em 0 }
td, th { border: 1px solid #d0d7de; padding: 4px 9px }
h4 { margin: 1em 0 .3em }
"""


def html_of(guide, start):
    """The HTML output of the first cell whose last line begins with `start`."""
    for cell in nbformat.read(GUIDES / f"{guide}.ipynb", as_version=4).cells:
        if cell.cell_type == "code" and (cell.source + "\n").splitlines(True)[-1].startswith(start):
            return next(
                o.data["text/html"] for o in cell.outputs if "text/html" in o.get("data", {})
            )
    raise SystemExit(f"{guide} has no cell that ends in {start!r}; run `make notebooks` first.")


def take(html, size, folder, picture):
    """A picture of some HTML, as a page shows it."""
    page = folder / "page.html"
    page.write_text(f"<meta charset=utf-8><style>{STYLE}</style>{html}", encoding="utf-8")
    flags = ["--headless", "--hide-scrollbars", *browser.FLAGS]
    options = [f"--window-size={size}", f"--screenshot={picture}"]
    command = [browser.get(), *flags, *options, str(page)]
    subprocess.run(command, check=True, capture_output=True)  # nosec B603 # the browser


def play(folder, picture):
    """A picture of the guided run while it trains."""
    file, test, step = GUIDED
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"{file}::{test}"]
    keep = os.environ | {"LORABOOK_PICTURES": str(folder), "LORABOOK_NEED_BROWSER": "1"}
    subprocess.run(command, check=True, env=keep)  # nosec B603 # our own test
    shutil.copy(folder / step, picture)


def main():
    for name in sys.argv[1:] or [*OUTPUTS, "guided_run"]:
        picture = IMAGES / f"{name}.png"
        with tempfile.TemporaryDirectory() as folder:
            if name in OUTPUTS:
                guide, start, size = OUTPUTS[name]
                take(html_of(guide, start), size, Path(folder), picture)
            else:
                play(Path(folder), picture)
        print(picture.relative_to(ROOT))


if __name__ == "__main__":
    main()
