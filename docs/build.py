"""The docs site, `python docs/build.py`: nbdev reads the notebooks, a bridge turns them into MyST,
and Sphinx makes the pages. Nothing is executed, and any warning is an error."""

import ast
import os
import re
import shutil
import sys
from importlib import import_module

from api import show_doc
from execnb.nbio import mk_cell, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor
from nbdev.processors import add_show_docs, filter_stream_, hide_line, rm_header_dash
from sphinx.cmd.build import main as sphinx

CONFIG = get_config()
ROOT, NBS, SITE = CONFIG.config_path, CONFIG.nbs_path, CONFIG.doc_path
PROC = ROOT / "_proc"
PAGES, HTML = PROC / "pages", PROC / "html"

EXPORTS = {"export", "exports", "exporti"}
LEFT_OUT = {"hide", "default_exp", "include: false"}
TAGS = {  # `exports` is missing: its source stays open
    "export": "hide-input",
    "exporti": "hide-input",
    "code-fold: true": "hide-input",
    "echo: false": "remove-input",
    "output: false": "remove-output",
}
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar, say: nothing without a kernel
SIDEBAR = "\n\n".join(
    f"```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{pattern}\n```"
    for caption, pattern in (("Guides", "guides/*"), ("Chapters", "[0-9]*"))
)
REDIRECT = (
    '<!doctype html><script>location.replace("{0}" + location.hash)</script><a href="{0}">{0}</a>'
)

FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
LEAD = re.compile(r"\A(# .+\n+)> (.+(?:\n> .+)*)")
# a heading, a link or a name in backticks; names in the first two are left alone
MENTION = re.compile(r"^#.*|\[[^\]]*\]\(([^)\s]*)\)|`([A-Za-z_][\w.]*)(?:\(\))?`", re.M)


def label(source):
    "What the folded source of an export cell is called: the names that it defines."
    nodes = ast.parse(source).body
    targets = [t for n in nodes for t in getattr(n, "targets", [getattr(n, "target", n)])]
    names = (getattr(t, "name", getattr(t, "id", None)) for t in targets)
    return "Source: " + (", ".join(filter(None, names)) or "imports")


def process(path):
    "A notebook for myst-nb, and the names that it documents: {name: path}."
    processor = NBProcessor(path, [hide_line, filter_stream_, rm_header_dash, add_show_docs])
    processor.process()
    nb, cells, documented = processor.nb, [], {}
    level, at, space = 1, 0, {}  # of the last heading; of the last export cell; its module
    for cell in nb.cells:
        directives = {" ".join([name, *args]) for name, args in cell.directives_.items()}
        if module := cell.directives_.get("default_exp"):
            space = vars(import_module(f"{CONFIG.lib_name}.{module[0]}"))
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if cell.cell_type == "markdown":
            lead = lambda m: m[1] + "{.lead}\n" + m[2].replace("\n> ", "\n")
            cell.source = LEAD.sub(lead, cell.source)
            for heading in re.findall(r"^(#+) ", FENCE.sub("", cell.source), re.M):
                level = len(heading)
            cells.append(cell)
        elif cell.source.startswith("show_doc("):
            text = eval(cell.source, {**space, "show_doc": show_doc})
            documented[re.search("`(.+?)`", text)[1]] = path
            text = "#" * (min(level, 3) + 1) + text.lstrip("#")
            # nbdev puts the names of an export cell after it, the last one first
            cells.insert(at if "has_sd" in cell else len(cells), mk_cell(text, "markdown"))
        elif cell.cell_type == "code" and not directives & LEFT_OUT:
            cell.metadata["tags"] = [TAGS[d] for d in TAGS if d in directives]
            if directives & EXPORTS:
                at = len(cells)
                cell.metadata["mystnb"] = {"code_prompt_show": label(cell.source)}
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            cells.append(cell)
    nb.cells = cells
    nb.metadata.pop("widgets", None)
    return nb, documented


def link(text, path, documented):
    "Link names to where they are documented, and files that are not of the book to the repository."

    def replace(match):
        target, name = match[1], match[2] or ""
        name = name if name in documented else name.split(".")[0]
        if name in documented:
            page = os.path.relpath(documented[name], path.parent)
            return f"[{match[0]}]({page}#{name.lower().replace('.', '')})"
        file = (path.parent / target.split("#")[0]).resolve() if target else NBS
        if file.exists() and not file.is_relative_to(NBS):
            url = f"{CONFIG.git_url}/blob/{CONFIG.branch}/{file.relative_to(ROOT).as_posix()}"
            return match[0].replace(f"({target})", f"({url})")
        return match[0]

    parts = FENCE.split(text)  # prose and code in turn
    return "".join(part if i % 2 else MENTION.sub(replace, part) for i, part in enumerate(parts))


def main():
    "Build it all. Returns the exit code of Sphinx, which is not zero after a warning."
    shutil.rmtree(PROC, ignore_errors=True)
    shutil.copytree(NBS, PAGES, ignore=shutil.ignore_patterns("*.ipynb", ".*", "outputs"))
    notebooks = {path: process(path) for path in sorted(nbglob(as_path=True))}
    documented = {name: path for _, names in notebooks.values() for name, path in names.items()}
    for path, (nb, _) in notebooks.items():
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = link(cell.source, path, documented)
        if path == NBS / "index.ipynb":
            nb.cells.append(mk_cell(SIDEBAR, "markdown"))
        write_nb(nb, PAGES / path.relative_to(NBS))

    options = ["-W", "--keep-going", "-q", "-c", f"{ROOT}/docs", "-d", f"{PROC}/doctrees"]
    code = sphinx([*options, str(PAGES), str(HTML)])
    for path in notebooks:  # nbdev's own links have no number: config.html is 01_config.html
        plain = HTML / path.relative_to(NBS).with_name(re.sub(r"^\d+_", "", path.stem) + ".html")
        if not plain.exists():
            plain.write_text(REDIRECT.format(path.stem + ".html"), encoding="utf-8")
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(HTML, SITE)
    return code


if __name__ == "__main__":
    sys.exit(main())
