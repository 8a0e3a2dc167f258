"""The docs site, `python docs/build.py`: the notebooks and the project's own files become MyST,
and Sphinx makes the pages. Nothing is executed, and any warning is an error."""

import re
import shutil
import sys

from bridge import CONFIG, NBS, ROOT, link, process, show_lead
from contents import GUIDES, RECIPES, book, listing, matching, sidebar
from execnb.nbio import write_nb
from nbdev.doclinks import nbglob
from reference import reference
from sphinx.cmd.build import main as sphinx

SITE = CONFIG.doc_path
PROC = ROOT / "_proc"
PAGES, HTML = PROC / "pages", PROC / "html"
REDIRECT = (
    '<!doctype html><script>location.replace("{0}" + location.hash)</script><a href="{0}">{0}</a>'
)


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def landing(notebooks):
    "The landing page: the README, in which the front takes the place of what follows its picture."
    parts = []
    for cell in notebooks["index.ipynb"].cells:
        outputs = (o["data"]["text/markdown"] for o in cell.get("outputs", ()))
        parts += [cell.source] if cell.cell_type == "markdown" else map("".join, outputs)
    opening, rest = "\n\n".join(parts).split("\n## ", 1)
    opening, mark, after = opening.partition("![")
    front = read("docs/pages/front.md").replace("<!-- picture -->", mark + after.split("\n")[0])
    for door, patterns in {"guides": GUIDES, "recipes": RECIPES}.items():
        front = front.replace(f"<!-- {door} -->", listing(matching(notebooks, *patterns)))
    return f"{opening}\n{front}\n## {rest}\n\n{sidebar(notebooks)}"


def texts(notebooks, documented):
    "All pages that are not notebooks: {path: text}."
    own = {path.name: read(path) for path in sorted((ROOT / "docs/pages").glob("*.md"))}
    log = read("benchmarks/LOG.md").partition("\n")[2]
    log = re.sub(r"\n(?=Expected|Result)", "\n\n", log)
    own["benchmarks.md"] += re.sub("^#", "##", log, flags=re.M)
    del own["front.md"]
    written = {"index.md": landing(notebooks), "changelog.md": read("CHANGELOG.md")}
    return written | own | book(notebooks) | reference(notebooks, documented)


def write_pages():
    "Everything that Sphinx reads. Returns the notebooks, {path below nbs: notebook}."
    shutil.rmtree(PROC, ignore_errors=True)
    shutil.copytree(NBS, PAGES, ignore=shutil.ignore_patterns("*.ipynb", ".*", "outputs"))
    shutil.copytree(
        ROOT / "benchmarks/results", PAGES / "results", ignore=shutil.ignore_patterns("*.json")
    )
    made = {path: process(path) for path in sorted(nbglob(as_path=True))}
    documented = {
        name: (path, at) for path, (_, names) in made.items() for name, at in names.items()
    }
    notebooks = {path.relative_to(NBS).as_posix(): nb for path, (nb, _) in made.items()}
    for path, text in texts(notebooks, documented).items():
        (PAGES / path).parent.mkdir(exist_ok=True)
        text = show_lead(link(text, NBS / path, documented))
        (PAGES / path).write_text(text, encoding="utf-8")
    del notebooks["index.ipynb"]
    for path, nb in notebooks.items():
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = show_lead(link(cell.source, NBS / path, documented))
        write_nb(nb, PAGES / path)
    return notebooks


def main():
    "Build it all. Returns the exit code of Sphinx, which is not zero after a warning."
    notebooks = write_pages()
    options = ["-W", "--keep-going", "-q", "-c", f"{ROOT}/docs", "-d", f"{PROC}/doctrees"]
    code = sphinx([*options, str(PAGES), str(HTML)])
    for path in map(HTML.joinpath, notebooks):  # nbdev's own links have no number: config.html
        plain = path.with_name(re.sub(r"^\d+_", "", path.stem) + ".html")
        if not plain.exists():
            plain.write_text(REDIRECT.format(path.stem + ".html"), encoding="utf-8")
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(HTML, SITE)
    return code


if __name__ == "__main__":
    sys.exit(main())
