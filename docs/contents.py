"""What is where: the sidebar, the pages of the book's parts, lists of notebooks with summaries."""

from fnmatch import fnmatch

from bridge import title_and_lead

# each page stands once: some guides are the recipes for one aim
GUIDES = "guides/0[12]*", "guides/08*", "guides/06*", "guides/05*", "guides/09*"
RECIPES = "guides/03*", "guides/04*", "recipes/01*", "guides/07*", "recipes/0[23]*"
REFERENCE = (
    "reference/index",
    "what_goes_wrong",
    "benchmarks",
    "glossary",
    "changelog",
)
PARTS = {  # page: the number of its first chapter, its title, what it is about
    "foundations": (0, "Foundations", """What everything else stands on: errors that say what to
        do, one config for a whole run, what the machine can do, and how memory is measured."""),
    "model": (19, "The model", """The base model and its tokenizer, the adapter, the loss, and
        layers and attention that compute the same in fewer steps."""),
    "data": (25, "The data", """From a file of almost any shape to rows of tokens, of which exactly
        those are trained that the assistant wrote."""),
    "plan": (38, "What it will need", """The memory of a run, counted before the run and without
        the card, and the fastest settings that fit."""),
    "proof": (46, "Proof", "Does it answer better than before, by how much, and may it be luck?"),
    "training": (53, "Training", """The training itself, as the `Trainer` and as a plain loop; what
        it survives; learning rates, sweeps and several GPUs."""),
    "taking_home": (67, "Taking it home", """Save the adapter, describe it, check it, merge it,
        serve it, and send it to the hub."""),
    "run": (76, "The run", "All pieces in a row: one function, one result, one command."),
    "panels": (82, "Panels", "The same steps with buttons and pictures, up to the guided run."),
    "underneath": (97, "Underneath", """Tiny models for tests, and the built-in model and data with
        the code that made them."""),
}  # fmt: skip
BOOK = """# The book

{.lead}
Every module of lorabook is a chapter that explains it, shows it and tests it. A chapter uses only
what stands before it, so the order is that of a building, from the ground up.

To follow one fine-tune instead, read these nine first:
[reading the data](../30_data.source.ipynb), [conversations as tokens](../32_data.chat.ipynb),
[rows and batches](../33_data.batch.ipynb), [the memory plan](../40_plan.ipynb),
[the base model](../20_model.load.ipynb), [the adapter](../21_model.adapter.ipynb),
[the trainer](../61_train.trainer.ipynb), [the comparison](../52_infer.compare.ipynb), and
[the whole run](../80_run.ipynb), which puts them in a row.

The site leaves out the cells that only set up an example or check it again. A name that comes out
of nowhere is defined there: open the chapter in Jupyter or Colab to see all cells. `test_eq` and
`test_close` are assertions of [fastcore](https://fastcore.fast.ai/test.html).
"""


def part_of(path):
    "The page of the part that a chapter belongs to."
    number = int(path.split("_")[0])
    return [page for page, (first, *_) in PARTS.items() if first <= number][-1]


def matching(notebooks, *patterns):
    "Those of the notebooks, {path below nbs: notebook}, whose paths fit, pattern by pattern."
    return {p: nb for pattern in patterns for p, nb in notebooks.items() if fnmatch(p, pattern)}


def toctree(entries, caption=""):
    "Pages for the sidebar."
    options = f":caption: {caption}\n" if caption else ""
    return f"```{{toctree}}\n:hidden:\n{options}\n" + "\n".join(entries) + "\n```\n"


def name(path, notebook):
    "The title of a notebook; a chapter's with its number, by which the text speaks of it."
    title, number = title_and_lead(notebook)[0], path.split("_")[0]
    return f"{int(number)}. {title}" if number.isdigit() else title


def listing(notebooks, above=""):
    "Links to notebooks, with their summaries."
    return "\n".join(
        f"[{name(path, nb)}]({above}{path})\n: {title_and_lead(nb)[1]}\n"
        for path, nb in notebooks.items()
    )


def book(notebooks):
    "The pages of the book's parts: {path: text}."
    pages, chapters = {}, matching(notebooks, "[0-9]*")
    whole = BOOK
    for page, (_, title, about) in PARTS.items():
        about = " ".join(about.split())
        own = {path: nb for path, nb in chapters.items() if part_of(path) == page}
        text = f"# {title}\n\n{{.lead}}\n{about}\n\n{listing(own, '../')}\n"
        pages[f"book/{page}.md"] = text + toctree(
            f"{name(path, nb)} <../{path[:-6]}>" for path, nb in own.items()
        )
        links = (f"[{name(path, nb)}](../{path})" for path, nb in own.items())
        whole += f"\n## [{title}]({page}.md)\n\n{about}\n\n" + " · ".join(links) + "\n"
    return {"book/index.md": whole, **pages}


def sidebar(notebooks):
    "The four ways through the site."
    guides, recipes = (matching(notebooks, *patterns) for patterns in (GUIDES, RECIPES))
    parts = ["All chapters <book/index>", *(f"book/{page}" for page in PARTS)]
    return "\n".join(
        toctree(entries, caption)
        for caption, entries in {
            "Guides": [path[:-6] for path in guides],
            "Recipes": [path[:-6] for path in recipes],
            "The book": parts,
            "Reference": REFERENCE,
        }.items()
    )
