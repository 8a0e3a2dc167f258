"""The docs site: it builds without a warning, its links lead somewhere, its pages work anywhere."""

import configparser
import functools
import http.server
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from conftest import ROOT

_INI = configparser.ConfigParser(interpolation=None)
_INI.read(ROOT / "settings.ini")
CONFIG = _INI["DEFAULT"]
SITE = ROOT / CONFIG["doc_path"]
REPOSITORY = CONFIG["git_url"], f"{CONFIG['user']}/{CONFIG['repo']}", CONFIG["branch"]
PHONE = dict(width=390, height=844)


@pytest.fixture(scope="module")
def built():
    "The site, built anew."
    command = [sys.executable, ROOT / "docs" / "build.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return SITE


class Page(HTMLParser):
    "Where a page leads, what in it can be led to, and the names with their sources."

    def __init__(self, path):
        super().__init__()
        self.targets, self.ids, self.sources = set(), set(), []
        self.heading, self.inside = "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.targets.update(given[name] for name in ("href", "src") if given.get(name))
        self.ids.update(filter(None, [given.get("id")]))
        if tag == "h3":
            self.heading, self.inside = "", True
        elif "#L" in (given.get("href") or ""):
            self.sources.append((self.heading, given["href"]))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "h3"

    def handle_data(self, data):
        self.heading += data if self.inside else ""


@pytest.fixture(scope="module")
def pages(built):
    "{path: `Page`}, without those that only lead on."
    paths = sorted(path for path in built.rglob("*.html") if "_static" not in path.parts)
    found = {path.relative_to(built).as_posix(): Page(path) for path in paths}
    return {path: page for path, page in found.items() if page.ids}


def missing(target, path, pages):
    "Whether an address on the page at `path` leads nowhere in the site."
    parts = urlsplit(urljoin(path, target))
    address = unquote(parts.path)
    if parts.fragment and address in pages:
        return parts.fragment not in pages[address].ids
    return not (SITE / address).is_file()


def test_every_chapter_has_a_page(pages):
    notebooks = {p.relative_to(ROOT / "nbs") for p in (ROOT / "nbs").rglob("*.ipynb")}
    notebooks = {p for p in notebooks if not {"outputs", ".ipynb_checkpoints"} & set(p.parts)}
    assert {p.with_suffix(".html").as_posix() for p in notebooks} <= set(pages)
    linked = {urljoin("index.html", target) for target in pages["index.html"].targets}
    for path in notebooks - {Path("index.ipynb")}:
        assert path.with_suffix(".html").as_posix() in linked, f"{path} is not in the sidebar"


def test_links_and_anchors(pages):
    internal = {
        (path, target)
        for path, page in pages.items()
        for target in page.targets
        if not urlsplit(target).scheme
    }
    assert len(internal) > 1000
    lost = [f"{path} -> {t}" for path, t in sorted(internal) if missing(t, path, pages)]
    assert not lost, "\n".join(lost)
    assert missing("index.html#nothing", "glossary.html", pages)
    assert missing("nothing.html", "glossary.html", pages)


def broken(url):
    "Whether an address of our repository, on GitHub or Colab, leads to no file or line of it."
    home, name, branch = REPOSITORY
    hosts = f"(?:{home}/(?:blob|tree)|https://colab.research.google.com/github/{name}/blob)"
    if not (match := re.fullmatch(rf"{hosts}/{branch}/([^#]*)(?:#L(\d+))?", url)):
        return url != home and not url.startswith(f"{home}/issues")
    path, line = ROOT / unquote(match[1]), int(match[2] or 0)
    return not path.exists() or line > 0 and line > len(path.read_bytes().splitlines())


def test_files_of_the_repository(pages):
    home, name, _ = REPOSITORY
    urls = {t for page in pages.values() for t in page.targets if home in t or f"/{name}/" in t}
    lost = sorted(url for url in urls if broken(url))
    assert not lost, "\n".join(lost)
    assert broken(f"{home}/blob/main/nothing.py")
    assert broken(f"{home}/blob/main/setup.py#L9999")


def test_source_lines(pages):
    "A link to the source of a name leads to the lines that define it."
    found = [pair for path, page in pages.items() if path[:3] == "ref" for pair in page.sources]
    assert len(found) > 200
    for name, url in found:
        address, _, line = url.partition("#L")
        file = ROOT / address.split(f"/blob/{CONFIG['branch']}/")[1]
        lines = file.read_text(encoding="utf-8").splitlines()[int(line) - 1 :][:6]
        name = name.rstrip("#")
        assert any(re.search(rf"(def|class) {name}\b", text) for text in lines), name


def test_colab(pages):
    "Notebooks, and only these, have a button that opens them."
    for path, page in pages.items():
        notebook = ROOT / "nbs" / Path(path).with_suffix(".ipynb")
        buttons = [t for t in page.targets if t.startswith("https://colab.")]
        expected = notebook.exists() and notebook.name != "index.ipynb"
        assert bool(buttons) == expected, path
        assert all(url.endswith(notebook.relative_to(ROOT).as_posix()) for url in buttons)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server(built):
    "The address of the site, served."
    handler = functools.partial(Quiet, directory=built)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def watched(chromium):
    "(a page as on a phone, the problems that it has met)."
    page, problems = chromium.new_page(), []
    page.set_viewport_size(PHONE)
    page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
    page.on("console", lambda m: m.type == "error" and problems.append(f"{page.url}: {m.text}"))
    others = lambda url: urlsplit(url).hostname not in (None, "127.0.0.1")
    asked = lambda r: others(r.url) and problems.append(f"{page.url} asks {r.url}")
    page.on("request", asked)
    yield page, problems
    page.close()


WIDE = """() => {
    const hides = e => getComputedStyle(e).overflowX != 'visible'
    const inside = e => e && (hides(e) || inside(e.parentElement))
    const wide = e => e.getBoundingClientRect().right > innerWidth + 1 && !inside(e.parentElement)
    const all = [...document.querySelectorAll('main *')]
    return all.filter(wide).slice(0, 3).map(e => e.outerHTML.slice(0, 80))
}"""
OVERFLOW = "() => document.documentElement.scrollWidth > innerWidth"
FAINT = """() => {
    const parse = text => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4)
    const ground = e => {
        if (!e) return [255, 255, 255]
        const [r, g, b, a] = parse(getComputedStyle(e).backgroundColor)
        const under = a < 1 ? ground(e.parentElement) : [0, 0, 0]
        return [r, g, b].map((value, i) => a * value + (1 - a) * under[i])
    }
    const curve = v => v / 255 <= 0.04045 ? v / 3295 : ((v / 255 + 0.055) / 1.055) ** 2.4
    const light = c => 0.2126 * curve(c[0]) + 0.7152 * curve(c[1]) + 0.0722 * curve(c[2]) + 0.05
    const contrast = e => {
        const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))]
        return Math.max(a, b) / Math.min(a, b)
    }
    const written = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())
    const text = 'article *:not(script, style, svg *, mjx-container *, .headerlink)'
    const all = [...document.querySelectorAll(text)].filter(e => written(e) && e.checkVisibility())
    return ['light', 'dark'].flatMap(theme => {
        document.documentElement.dataset.theme = theme
        const faint = all.filter(e => contrast(e) < 3).slice(0, 3)
        return faint.map(e => `${contrast(e).toFixed(1)} if ${theme}: ${e.outerHTML.slice(0, 80)}`)
    })
}"""


def test_pages_in_a_browser(server, watched, pages):
    """No page asks another host, has an error, is wider than a phone, or has text that is hard to
    see, in outputs either, where a notebook chose the colours."""
    page, problems = watched
    page.emulate_media(reduced_motion="reduce")
    for path in pages:
        page.goto(server + path)
        if page.evaluate(OVERFLOW):
            problems.append(f"{path} is too wide: {page.evaluate(WIDE)}")
        problems += [f"{path} has faint text: {text}" for text in page.evaluate(FAINT)]
    assert not problems, "\n".join(problems)
    bad = "color: #888; background: #888; width: 500px"
    page.evaluate("bad => document.querySelector('article p').style.cssText = bad", bad)
    assert page.evaluate(FAINT) and page.evaluate(OVERFLOW)


@pytest.mark.parametrize("from_file", [False, True], ids=["served", "file"])
def test_search(from_file, server, watched, built):
    "What is looked for is found, without a server too."
    page, _ = watched
    start = built.as_uri() + "/" if from_file else server
    page.goto(start + "search.html?q=packing")
    results = page.locator("#search-results li a")
    results.first.wait_for()
    page.wait_for_function("document.querySelectorAll('#search-results li a').length > 5")
    assert "34_data.pack.html" in " ".join(a.get_attribute("href") for a in results.all())
    results.first.click()
    assert "packing" in page.locator("main").inner_text().lower()
    page.goto(start + "search.html?q=CUDA+out+of+memory")
    results.first.wait_for()
    assert "what_goes_wrong.html" in results.first.get_attribute("href")
