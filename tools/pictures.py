"""The pictures of the README: python tools/pictures.py [tokens | plan | comparison | guided_run]

Most are saved outputs of the guides; the guided run is played in a browser, by its test, which
takes a minute or two. A browser is installed first where there is none.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from base64 import b64decode
from pathlib import Path

import browser
import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
FIGURES = {
    "plan": ("40_plan", "figure\n")
}  # name: (notebook, what its cell's last line begins with)
PAGES = {  # as above, and the size of the window
    "tokens": ("guides/01_quickstart", "show_tokens(", "900,215"),
    "comparison": ("guides/01_quickstart", "result\n", "1000,1000"),
}
GUIDED = ROOT / "tests" / "test_guided_run.py", "test_run_all", "6_finished.png"
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 20px; background: #fff; color: #1f2328 }
table { border-collapse: collapse; margin: .5em 0 }
td, th { border: 1px solid #d0d7de; padding: 4px 9px }
h4 { margin: 1em 0 .3em }
"""


def output(notebook, start, kind):
    """The first output of a kind that a notebook has saved under a cell whose last line fits."""
    for cell in nbformat.read(NBS / f"{notebook}.ipynb", as_version=4).cells:
        if cell.cell_type == "code" and (cell.source + "\n").splitlines(True)[-1].startswith(start):
            for shown in cell.outputs:
                if kind in shown.get("data", {}):
                    return shown.data[kind]
    raise SystemExit(f"{notebook} has no {kind} under {start!r}; run `make notebooks` first.")


def take(html, size, folder, picture):
    """A picture of some HTML, as a page shows it."""
    page = folder / "page.html"
    page.write_text(f"<meta charset=utf-8><style>{STYLE}</style>{html}", encoding="utf-8")
    flags = ["--headless", "--hide-scrollbars", *browser.FLAGS]
    options = [f"--window-size={size}", f"--screenshot={picture}"]
    command = [browser.get(), *flags, *options, str(page)]
    subprocess.run(command, check=True, capture_output=True)  # nosec B603 # the browser


def play(folder, picture):
    """A picture of the guided run after its training."""
    file, test, step = GUIDED
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"{file}::{test}"]
    keep = os.environ | {"LORABOOK_PICTURES": str(folder), "LORABOOK_NEED_BROWSER": "1"}
    subprocess.run(command, check=True, env=keep)  # nosec B603 # our own test
    shutil.copy(folder / step, picture)


def main():
    for name in sys.argv[1:] or [*FIGURES, *PAGES, "guided_run"]:
        picture = NBS / "images" / f"{name}.png"
        with tempfile.TemporaryDirectory() as folder:
            if name in FIGURES:
                picture.write_bytes(b64decode(output(*FIGURES[name], "image/png")))
            elif name in PAGES:
                *place, size = PAGES[name]
                take(output(*place, "text/html"), size, Path(folder), picture)
            else:
                play(Path(folder), picture)
        print(picture.relative_to(ROOT))


if __name__ == "__main__":
    main()
