"""The panel over a dataset shows whatever is in it, and nothing of it acts."""

import re
from html.parser import HTMLParser

import pytest
from hostile import TEXTS, hostile_file, hostile_rows

from lorabook.config import RunConfig
from lorabook.data.source import load_and_prepare_data
from lorabook.errors import DataError
from lorabook.widgets.data import DataView

TAGS = set("p b ol li table tr td th bdi div span br wbr small code svg rect title path".split())
ATTRIBUTES = set("style title role aria-label width height x y d fill opacity colspan".split())
ATTRIBUTES |= {"stroke", "stroke-dasharray"}
UNSEEN = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200f\u202a-\u202e\u2066-\u2069]"


class Page(HTMLParser):
    "What a browser would act upon."

    def __init__(self, html):
        super().__init__()
        self.tags, self.names, self.values = set(), set(), []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.names |= {name for name, _ in attributes}
        self.values += [value or "" for _, value in attributes]


def check(html):
    page = Page(html)
    assert page.tags <= TAGS and page.names <= ATTRIBUTES
    assert not any("hostile" in value or "url(" in value for value in page.values)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200f\u202a-\u202e\u2066-\u2069]", html
    )
    assert "1337" not in html  # what the template in a row would give
    assert len(html) < 1_000_000


@pytest.mark.parametrize("shape", ["messages", "instruction"])
def test_hostile_rows(shape, tmp_path, builtin):
    cfg = RunConfig().override("data.split=[1, 0, 0]", "model.max_length=4096")
    view = DataView(hostile_file(tmp_path / "mine.jsonl", shape), builtin[1], cfg)
    assert not view.problems and not view.fault.value
    assert view.number.max == len(hostile_rows(shape)) == len(TEXTS)
    seen = ""
    for number in range(1, view.number.max + 1):
        view.number.value = number
        check(view.html())
        assert not view.fault.value and "What it learns" in view.row.value
        seen += view.row.value
    for name in TEXTS:
        assert f">{name} " in seen, name


def test_hostile_problems(tmp_path, builtin):
    view = DataView(hostile_file(tmp_path / "mine.jsonl", problems=True), builtin[1])
    assert len(view.problems) > 60 and view.faults.value.count("<li>") == 20
    check(view.html())
    name = "<script>window.hostile=1</script>.jsonl"
    view.file.value = str(tmp_path / name.replace("/", "\x1b[2J"))
    view.look()
    check(view.html())
    assert len(view.problems) == 1 and not view.fault.value


def test_problems_are_those_of_a_run(tmp_path):
    "The first in the panel is the one that stops a run."
    path = hostile_file(tmp_path / "mine.jsonl", problems=True)
    with pytest.raises(DataError) as caught:
        load_and_prepare_data(path)
    assert str(DataView(path).problems[0]) == str(caught.value)
