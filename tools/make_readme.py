"""README.md from nbs/index.ipynb: python tools/make_readme.py [--check]"""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme():
    """The landing page as Markdown, without cells that are hidden."""
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    hidden = re.compile(r"^#\|\s*(hide|default_exp)", flags=re.M)
    notebook.cells = [cell for cell in notebook.cells if not hidden.search(cell.source)]
    for cell in notebook.cells:
        if cell.source.startswith("#| echo: false"):  # its output alone
            cell.metadata["transient"] = {"remove_source": True}
        cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
    notebook.metadata["language_info"] = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r"\]\((?!https?:|#|mailto:)([^)]+)\)", r"](nbs/\1)", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    target = ROOT / "README.md"
    if "--check" in sys.argv:
        sys.exit(target.read_text(encoding="utf-8") != readme())
    target.write_text(readme(), encoding="utf-8")
