"""The API reference: every public name, with its source and the chapter that explains it."""

import inspect
from importlib import import_module

from api import show_doc, table
from bridge import NBS, ROOT, on_github
from contents import PARTS, part_of, toctree

import lorabook

OTHERS = "other"  # the page of the modules that are in no package
PUBLIC = """# API reference

{.lead}
The public names, as they are after `import lorabook as lb`. Each is loaded when it is first used,
so the import itself takes no time.

All other names that a module exports are on the page of its package: PACKAGES.
The [command line](../81_cli.ipynb) has a chapter of its own.

"""


def source(obj):
    "Where a function or class is defined, on GitHub."
    obj = inspect.unwrap(obj)
    _, line = inspect.getsourcelines(obj)
    return f"{on_github(ROOT / inspect.getsourcefile(obj))}#L{line}"


def entry(name, obj, notebook, documented):
    "All about one name: a chapter's text on it, with links to the chapter and the source."
    path, anchor = documented.get(name, (None, ""))
    at = f"#{anchor}" if path == NBS / notebook else ""
    links = f"[Chapter](../{notebook}{at}) · [Source]({source(obj)})"
    head, _, rest = show_doc(obj, name).partition("\n\n")
    return f"{head}\n\n{links}\n\n{rest}\n"


def values(pairs):
    "A table of names that are neither functions nor classes."
    short = lambda value: text if len(text := repr(value)) < 70 else f"{text[:66]} ..."
    rows = [(f"`{name}`", f"`` {short(value)} ``") for name, value in pairs]
    return table(("Name", "Value"), rows)


def is_code(obj):
    return inspect.isclass(obj) or inspect.isroutine(obj)


def module_section(module, notebook, documented):
    "A module's section: its own names in full, the public ones as links."
    names = {name: getattr(module, name) for name in module.__all__}
    public = {name for name in names if name in lorabook.__all__}
    lines = [f"## `{module.__name__}`", f"{module.__doc__}", f"[Chapter](../{notebook})"]
    if public:
        links = (f"[`{name}`](index.md#{name.lower()})" for name in names if name in public)
        lines.append("Public: " + ", ".join(links))
    rest = {name: obj for name, obj in names.items() if name not in public}
    lines.append(values((n, obj) for n, obj in rest.items() if not is_code(obj)))
    lines += [entry(n, obj, notebook, documented) for n, obj in rest.items() if is_code(obj)]
    return "\n\n".join(filter(None, lines))


def reference(notebooks, documented):
    "The pages of the reference: {path: text}."
    chapters = {path[:-6].partition("_")[2]: path for path in notebooks if path[0].isdigit()}
    pages, public, own = {}, {page: [] for page in PARTS}, {}
    for name, path in chapters.items():
        module = import_module(f"{lorabook.__name__}.{name}")
        page = name.split(".")[0] if "." in name else OTHERS
        title = f"`lorabook.{page}`" if "." in name else "Other modules"
        text = pages.setdefault(page, f"# {title}\n\nOWN\n")
        pages[page] = f"{text}\n{module_section(module, path, documented)}\n"
        for n in module.__all__:
            if n in lorabook.__all__:
                public[part_of(path)].append((n, getattr(module, n), path))
                own.setdefault(page, []).append(f"[`{n}`](index.md#{n.lower()})")
    for page, text in pages.items():  # before the names that only chapters need
        links = ", ".join(own.get(page, []))
        pages[page] = text.replace("OWN", f"What most users need: {links}." if links else "", 1)
    links = ", ".join(f"[{'others' if p == OTHERS else p}]({p}.md)" for p in pages)
    text = PUBLIC.replace("PACKAGES", links)
    for page, names in public.items():
        if names:
            parts = [entry(*each, documented) for each in names]
            text += f"## {PARTS[page][1]}\n\n" + "\n".join(parts) + "\n"
    return {
        "reference/index.md": text + toctree(pages),
        **{f"reference/{page}.md": text for page, text in pages.items()},
    }
