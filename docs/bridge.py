"""A notebook becomes what myst-nb reads, and names and files in a text become links."""

import ast
import os
import re
from importlib import import_module
from textwrap import TextWrapper

from api import show_doc
from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import add_show_docs, filter_stream_, hide_line, rm_header_dash

CONFIG = get_config()
ROOT, NBS = CONFIG.config_path, CONFIG.nbs_path

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
GAP = re.compile(r"\S {2,}\S")
COLUMNS = re.compile(rf"(?:^.*{GAP.pattern}.*\n){{2}}", re.M)  # two lines: printed as a table
SENTENCES = TextWrapper(100, break_long_words=False, break_on_hyphens=False)

FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
LEAD = re.compile(r"\A# (.+)\n+> (.+(?:\n> .+)*)")
# a heading, the first cell of a row, a link, or a name in backticks, which alone is linked
MENTION = re.compile(r"^#.*|^\| `[^`]+`|\[[^\]]*\]\(([^)\s]*)\)|`([A-Za-z_][\w.]*)(?:\(\))?`", re.M)


def label(source):
    "What the folded source of an export cell is called: the names that it defines."
    nodes = ast.parse(source).body
    targets = [t for n in nodes for t in getattr(n, "targets", [getattr(n, "target", n)])]
    names = (getattr(t, "name", getattr(t, "id", None)) for t in targets)
    return "Source: " + (", ".join(dict.fromkeys(filter(None, names))) or "imports")


def title_and_lead(nb):
    "What a notebook is called, and its summary in one line."
    title, lead = LEAD.match(next(c.source for c in nb.cells if c.cell_type == "markdown")).groups()
    return title, lead.replace("\n> ", " ")


def in_columns(output):
    "Whether a printed output is a table, whose lines should not be broken; long sentences are."
    text = "".join(output.get("text", ""))
    if not COLUMNS.search(text + "\n"):
        return False
    lines = [line if GAP.search(line) else SENTENCES.fill(line) for line in text.split("\n")]
    output["text"] = "\n".join(lines)
    return True


def process(path):
    "A notebook for myst-nb, and the names that it documents: {name: anchor}."
    processor = NBProcessor(path, [hide_line, filter_stream_, rm_header_dash, add_show_docs])
    processor.process()
    nb, cells = processor.nb, []
    level, at, space = 1, 0, {}  # of the last heading; of the last export cell; its module
    for cell in nb.cells:
        directives = {" ".join([name, *args]) for name, args in cell.directives_.items()}
        if module := cell.directives_.get("default_exp"):
            space = vars(import_module(f"{CONFIG.lib_name}.{module[0]}"))
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^(#+) ", FENCE.sub("", cell.source), re.M):
                level = len(heading)
            cells.append(cell)
        elif cell.source.startswith("show_doc("):
            text = eval(cell.source, {**space, "show_doc": show_doc})
            text = "#" * (min(level, 3) + 1) + text.lstrip("#")
            # nbdev puts the names of an export cell after it, the last one first
            cells.insert(at if "has_sd" in cell else len(cells), mk_cell(text, "markdown"))
        elif cell.cell_type == "code" and not directives & LEFT_OUT:
            cell.metadata["tags"] = [TAGS[d] for d in TAGS if d in directives]
            if directives & EXPORTS:
                at = len(cells)
                cell.metadata["mystnb"] = {"code_prompt_show": label(cell.source)}
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            cell.metadata["tags"] += ["columns"] * any(map(in_columns, cell.outputs))
            cells.append(cell)
    nb.cells = cells
    nb.metadata.pop("widgets", None)
    return nb, anchors(cells)


def anchors(cells):
    "The anchors of the names that have a heading; `workload` is another than `Workload`."
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    names = re.findall(r"^#+ `([A-Za-z_][\w.]*)`$", "\n".join(texts), re.M)
    slugs, found = [], {}
    for name in names:
        slugs.append(name.lower().replace(".", ""))
        before = slugs[:-1].count(slugs[-1])
        found[name] = f"{slugs[-1]}-{before}" if before else slugs[-1]
    return found


def show_lead(text):
    "The summary below a title, marked for the style sheet."
    return LEAD.sub(lambda m: f"# {m[1]}\n\n{{.lead}}\n" + m[2].replace("\n> ", "\n"), text)


def on_github(file, name=""):
    "The address of a file in the repository; with a name, that of the line which defines it."
    path = file.relative_to(ROOT).as_posix()
    if name:
        nodes = ast.parse(file.read_text(encoding="utf-8")).body
        lines = {getattr(node, "name", None): node.lineno for node in nodes}
        path += f"#L{lines[name]}"  # a `KeyError` names what is gone
    return f"{CONFIG.git_url}/{'tree' if file.is_dir() else 'blob'}/{CONFIG.branch}/{path}"


def link(text, path, documented):
    """Link names to where they are documented, and files outside the book to the repository.

    `tests/test_x.py::test_y` is a link to the line of a test.
    """

    def replace(match):
        target, name = match[1], match[2] or ""
        name = name if name in documented else name.split(".")[0]
        if name in documented:
            page, anchor = documented[name]
            return f"[{match[0]}]({os.path.relpath(page, path.parent)}#{anchor})"
        plain, _, test = (target or "").partition("::")
        file = (path.parent / plain.split("#")[0]).resolve() if target else NBS
        if file.exists() and not file.is_relative_to(NBS):
            return match[0].replace(f"({target})", f"({on_github(file, test)})")
        if target and "://" not in target:  # Jupyter keeps capitals; the index is no notebook
            where, mark, anchor = target.replace("index.ipynb", "index.md").partition("#")
            return match[0].replace(f"({target})", f"({where}{mark}{anchor.lower()})")
        return match[0]

    parts = FENCE.split(text)  # prose and code in turn
    return "".join(part if i % 2 else MENTION.sub(replace, part) for i, part in enumerate(parts))
