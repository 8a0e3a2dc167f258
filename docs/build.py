"""Build the docs site, `python docs/build.py`: nbdev reads the notebooks, Sphinx makes the pages, a warning is an error."""

import ast
import os
import re
import shutil
import sys
from importlib import import_module

from execnb.nbio import mk_cell, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor
from nbdev.processors import add_show_docs, filter_stream_, hide_line, rm_header_dash
from sphinx.cmd.build import main as sphinx

from api import show_doc

CONFIG = get_config()
ROOT, NBS, SITE = CONFIG.config_path, CONFIG.nbs_path, CONFIG.doc_path
PROC = ROOT / "_proc"
PAGES, HTML = PROC / "pages", PROC / "html"
EXPORTED, DROPPED = {"export", "exports", "exporti"}, {"hide", "default_exp", "include: false"}
TAGS = {"export": "hide-input", "exporti": "hide-input", "code-fold: true": "hide-input"} | {
    "echo: false": "remove-input", "output: false": "remove-output"
}
SIDEBAR = "\n\n".join(
    f"```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{pattern}\n```"
    for caption, pattern in (("Guides", "guides/*"), ("Chapters", "[0-9]*"))
)
WIDGET = "application/vnd.jupyter.widget-view+json"  # such as a progress bar: nothing without a kernel
FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
REDIRECT = '<!doctype html><title>{0}</title><script>location.replace("{0}" + location.hash)</script><a href="{0}">{0}</a>\n'


def label(source):
    "What the folded source of an export cell is called: the names that it defines."
    names = []
    for node in ast.parse(source).body:
        for target in getattr(node, "targets", [getattr(node, "target", node)]):
            names.append(getattr(target, "name", getattr(target, "id", None)))
    return "Source: " + (", ".join(filter(None, names)) or "imports")


def process(path):
    "Read a notebook and turn its directives into tags and its `show_doc`s into prose; return the names so documented, too."
    processor = NBProcessor(path, [hide_line, filter_stream_, rm_header_dash, add_show_docs])
    processor.process()
    nb, cells, documented = processor.nb, [], {}
    level, export, space = 1, 0, {"show_doc": show_doc}
    for cell in nb.cells:
        directives = {" ".join([k, *v]) for k, v in cell.directives_.items()}
        if module := cell.directives_.get("default_exp"):
            space = vars(import_module(f"{CONFIG.lib_name}.{module[0]}")) | space
        if cell.cell_type == "markdown":
            lead = re.compile(r"\A(# .+\n+)> (.+(?:\n> .+)*)")
            cell.source = lead.sub(lambda m: m[1] + "{.lead}\n" + m[2].replace("\n> ", "\n"), cell.source)
            headings = re.findall(r"^(#+) ", FENCE.sub("", cell.source), re.M)
            level = len(headings[-1]) if headings else level
            cells.append(cell)
        elif cell.source.startswith("show_doc("):
            shown = eval(cell.source, space)
            documented[re.search("`(.+?)`", shown)[1]] = path
            shown = mk_cell("#" * (min(level, 3) + 1) + shown.lstrip("#"), "markdown")
            # nbdev puts the names of an export cell after it, the last one first
            cells.insert(export if "has_sd" in cell else len(cells), shown)
        elif cell.cell_type == "code" and not directives & DROPPED:
            export = len(cells) if directives & EXPORTED else export
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            cell.metadata["tags"] = [TAGS[d] for d in TAGS if d in directives]
            cell.metadata["mystnb"] = {"code_prompt_show": label(cell.source)} if directives & EXPORTED else {}
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            cells.append(cell)
    nb.cells = cells
    nb.metadata.pop("widgets", None)
    return nb, documented


def link(path, text, documented):
    "Link names in backticks to where they are documented, and files outside of the notebooks to the repository."

    def replace(match):
        everything, target, name = match[0], match[1], match[2]
        home = documented.get(name) or documented.get((name or "").split(".")[0])
        file = (path.parent / target.split("#")[0]).resolve() if target else NBS
        if home:
            anchor = (name if name in documented else name.split(".")[0]).lower().replace(".", "")
            return f"[{everything}]({os.path.relpath(home, path.parent)}#{anchor})"
        if file.exists() and not file.is_relative_to(NBS):
            url = f"{CONFIG.git_url}/blob/{CONFIG.branch}/{file.relative_to(ROOT).as_posix()}"
            return everything.replace(f"({target})", f"({url})")
        return everything

    # headings and links keep the names in them as they are
    found = re.compile(r"^#.*|\[[^\]]*\]\(([^)\s]*)\)|`([A-Za-z_][\w.]*)(?:\(\))?`", re.M)
    parts = FENCE.split(text)
    return "".join(part if i % 2 else found.sub(replace, part) for i, part in enumerate(parts))


def main():
    "The exit code of Sphinx: not zero after a warning."
    shutil.rmtree(PROC, ignore_errors=True)
    shutil.copytree(NBS, PAGES, ignore=shutil.ignore_patterns("*.ipynb", ".*", "outputs"))
    paths = sorted(nbglob(as_path=True))
    notebooks = {path: process(path) for path in paths}
    documented = {name: path for _, names in notebooks.values() for name, path in names.items()}
    for path, (nb, _) in notebooks.items():
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = link(path, cell.source, documented)
        if path == NBS / "index.ipynb":
            nb.cells.append(mk_cell(SIDEBAR, "markdown"))
        write_nb(nb, PAGES / path.relative_to(NBS))
    options = ["-W", "--keep-going", "-q", "-c", str(ROOT / "docs"), "-d", str(PROC / "doctrees")]
    failed = sphinx([*options, str(PAGES), str(HTML)])
    for path in paths:  # nbdev's own links have no numbers: config.html -> 01_config.html
        page = path.relative_to(NBS).with_suffix("").as_posix() + ".html"
        plain = HTML / re.sub(r"(^|/)\d+[a-z]?_", r"\1", page)
        if not plain.exists():
            plain.write_text(REDIRECT.format(page.split("/")[-1]))
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(HTML, SITE)
    return failed


if __name__ == "__main__":
    sys.exit(main())
