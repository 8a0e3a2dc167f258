"""The pictures of the README, from the saved outputs of the quickstart: python tools/pictures.py

A browser is installed first where there is none.
"""

import subprocess
import tempfile
from pathlib import Path

import browser
import nbformat

ROOT = Path(__file__).resolve().parent.parent
PICTURES = {"tokens": ("show_tokens(", "900,215"), "result": ("result\n", "1000,1460")}
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 20px; background: #fff; color: #1f2328 }
table { border-collapse: collapse; margin: .5em 0 }
td, th { border: 1px solid #d0d7de; padding: 4px 9px }
h4 { margin: 1em 0 .3em }
"""


def html_of(notebook, start):
    """The HTML output of the first cell whose last line begins with `start`."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and (cell.source + "\n").splitlines(True)[-1].startswith(start):
            return next(
                o.data["text/html"] for o in cell.outputs if "text/html" in o.get("data", {})
            )
    raise SystemExit(
        f"The quickstart has no cell that ends in {start!r}; run `make notebooks` first."
    )


def main():
    path = browser.get()
    notebook = nbformat.read(ROOT / "nbs" / "guides" / "01_quickstart.ipynb", as_version=4)
    flags = ["--headless", "--hide-scrollbars", *browser.FLAGS]
    with tempfile.TemporaryDirectory() as folder:
        for name, (start, size) in PICTURES.items():
            page, picture = Path(folder) / f"{name}.html", ROOT / "nbs" / "images" / f"{name}.png"
            body = html_of(notebook, start)
            page.write_text(f"<meta charset=utf-8><style>{STYLE}</style>{body}", encoding="utf-8")
            options = [f"--window-size={size}", f"--screenshot={picture}"]
            command = [path, *flags, *options, str(page)]
            subprocess.run(command, check=True, capture_output=True)  # nosec B603 # the browser
            print(picture.relative_to(ROOT))


if __name__ == "__main__":
    main()
