"""Every command and code block in the README, the docs and the prose of the notebooks is true, and
each guide and recipe opens and ends as all do.

Commands are parsed and not run: options, files, make targets and settings have to exist. Python is
run. Where it needs what is not here, such as Colab, its block begins with ```py norun, and only its
names and arguments are looked up. YAML has to be a config. tests/test_readme.py has the README's
own Python.
"""

import argparse
import ast
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from markdown_it import MarkdownIt
from test_readme import README, SMALL

import lorabook as lb
from lorabook.cli import _COMMANDS, _read
from lorabook.hardware import find_device

PAGES = [*ROOT.glob("*.md"), ROOT / "benchmarks" / "LOG.md", *(ROOT / "docs").rglob("*.md")]
PAGES += [path for path in (ROOT / "nbs").rglob("*.ipynb") if "checkpoints" not in str(path)]
ELSEWHERE = {"cd", "git", "llama-server", "ollama", "pre-commit", "source", "srun", "vllm"}
FOLDERS = {"benchmarks", "configs", "docs", "nbs", "tests", "tools"}
PYTHON, PLAIN = {"py", "python"}, {"", "text", "markdown"}
SHELL, DATA = {"sh", "bash", "shell"}, {"json", "jsonl", "yaml"}


def prose(path):
    "The markdown of a page."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [text]
    cells = json.loads(text)["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def examples():
    "Of each block and each piece of inline code: page, language with what is behind it, code."
    for path in sorted(PAGES):
        for text in prose(path):
            tokens = MarkdownIt().parse(text)
            for token in [*tokens, *(child for t in tokens for child in t.children or ())]:
                if token.type in ("fence", "code_block", "code_inline"):
                    kind = "inline" if token.type == "code_inline" else token.info.strip()
                    yield path.relative_to(ROOT).as_posix(), kind, token.content


EXAMPLES = list(dict.fromkeys(examples()))


# Commands


def check_lorabook(words, *, whole=True):
    "The words behind `lorabook`. A command that is only named needs no arguments."
    if not whole and words[0] in _COMMANDS and len(words) == 1:
        return
    _, found = _read(words)
    files = [word for word in getattr(found, "config", []) if "=" not in word]
    assert len(files) <= 1, files
    lb.RunConfig().override(*(set(getattr(found, "config", [])) - set(files)))
    if getattr(found, "device", None):
        find_device(found.device)


def check_make(words):
    "The words behind `make`."
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, given, value = word.partition("=")
        pattern = rf"\$\({name}\)" if given else rf"^{name}:"
        assert re.search(pattern, text, flags=re.M), f"no {word} in the Makefile"
        if name == "ARGS":
            check_lorabook(["run", *shlex.split(value)])


def value_of(node, trees):
    "The value of a keyword argument; of a name, what is assigned to it; None if it is computed."
    if isinstance(node, ast.Name):
        if node.id in ("int", "float", "str"):
            return {"int": int, "float": float, "str": str}[node.id]
        assigned = (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Assign))
        node = next(n.value for n in assigned if getattr(n.targets[0], "id", None) == node.id)
    try:
        return ast.literal_eval(ast.List(node.keys) if isinstance(node, ast.Dict) else node)
    except ValueError:
        return None


def check_script(path, words):
    "The words behind a script; its options are read from its source, without running it."
    files = [path, *path.parent.glob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    called = [node for node in ast.walk(trees[0]) if isinstance(node, ast.Call)]
    parser = argparse.ArgumentParser()
    options = [call for call in called if getattr(call.func, "attr", "") == "add_argument"]
    for option in options:
        settings = {keyword.arg: value_of(keyword.value, trees) for keyword in option.keywords}
        parser.add_argument(*map(ast.literal_eval, option.args), **settings)
    if options:
        parser.parse_args(words)
    else:
        source = ast.unparse(trees[0])
        assert all(repr(word) in source for word in words if word.startswith("-")), words


def check_python(words):
    "The words behind `python`."
    if words[0] == "-m":
        if words[1] == "lorabook.cli":
            check_lorabook(words[2:])
        assert words[1] == "build" or importlib.util.find_spec(words[1]), words[1]
    elif words[0] == "-c":
        check_names(words[1])
    else:
        check_script(ROOT / words[0], words[1:])


def check_pip(words):
    "The words behind `pip`: extras have to exist. What else is installed is others'."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    for extra in re.findall(r"(?:lorabook|\.)\[(\w+)\]", " ".join(words)):
        assert f"{extra}_requirements" in settings["DEFAULT"], extra


def check_torchrun(words):
    "The words behind `torchrun`."
    run = import_module("torch.distributed.run").get_args_parser().parse_args(words)
    check_python(["-m" if run.module else "", run.training_script, *run.training_script_args])


CHECKS = dict(make=check_make, python=check_python, pip=check_pip, torchrun=check_torchrun)


def commands(code):
    "The words of each command: without comments, variables in front, and files behind a `>`."
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("; ", " ; "), comments=True)
        while words:
            at = min(
                [words.index(mark) for mark in ("&&", "|", ";") if mark in words] or [len(words)]
            )
            first, words = words[:at], words[at + 1 :]
            first = first[: first.index(">")] if ">" in first else first
            while re.match("[A-Z_]+=", first[0]):
                del first[0]
            yield [re.sub(r"^(python|pip)3$", r"\1", Path(first[0]).name.lstrip("%")), *first[1:]]


def check_command(words, pytestconfig, whole=True):
    "A command that does not do what a page says makes an error."
    program, *rest = words
    for word in rest:
        if Path(word).parts[:1] and Path(word).parts[0] in FOLDERS and "/" in word:
            assert (ROOT / word.split("::")[0]).exists(), f"{word} does not exist"
    if program == "lorabook":
        check_lorabook(rest, whole=whole)
    elif program == "pytest":
        _, unknown = pytestconfig._parser.parse_known_and_unknown_args(rest)
        assert not unknown, f"pytest does not know {unknown}"
    elif program in CHECKS:
        CHECKS[program](rest)
    else:
        beside = Path(sys.executable).parent  # of a venv that is not activated
        known = shutil.which(program) or shutil.which(program, path=beside)
        assert program in ELSEWHERE or known, f"{program} is not known here"


PROGRAMS = {"lorabook", "pytest", "ruff", "nbdev_test", "nbdev_export", "jupyter", *CHECKS}


def is_command(line):
    "Whether a line of a block without a language, or inline code, is a command of ours."
    words = re.sub(r"^\S*/", "", line.strip().lstrip("%")).split(" ")
    return words[0] in PROGRAMS and len(words) > 1


def shell_lines():
    "Page, command, and whether it stands in a block."
    for page, kind, code in EXAMPLES:
        language = kind.split(" ")[0]
        lines = [code] if language in SHELL else code.splitlines()
        if language in SHELL or language in PLAIN | {"inline"}:
            for line in lines:
                if language in SHELL or is_command(line):
                    yield page, line, language != "inline"


@pytest.mark.parametrize("page", sorted({page for page, *_ in shell_lines()}))
def test_commands(page, pytestconfig, capsys):
    for _, code, whole in (found for found in shell_lines() if found[0] == page):
        for words in commands(code):
            try:
                check_command(words, pytestconfig, whole)
            except (SystemExit, Exception) as error:
                if getattr(error, "code", 1) != 0:  # --help and --version end with 0
                    pytest.fail(f"{shlex.join(words)}: {error!r} {capsys.readouterr().err}")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("lorabook plan --device T4", "lorabook plan --devce T4"),
        ("lorabook plan --device T4", "lorabook plan --device T5"),
        ("lorabook run training.max_steps=20", "lorabook run training.max_step=20"),
        ("lorabook merge a b", "lorabook merge"),
        ("lorabook runs", "lorabok runs"),
        ("make test", "make tset"),
        ('make run ARGS="training.max_steps=20"', 'make run ARGS="training.max_stesp=20"'),
        ("python benchmarks/train.py --workload cpu", "python benchmarks/train.py --workload cup"),
        ("python benchmarks/prepare.py --rows 10", "python benchmarks/prepare.py --rows many"),
        ("python benchmarks/start.py", "python benchmarks/strat.py"),
        ("python tools/run_notebooks.py --slow", "python tools/run_notebooks.py --slowly"),
        ("python -m lorabook.cli run", "python -m lorabok.cli run"),
        ('pip install "lorabook[app]"', 'pip install "lorabook[aap]"'),
        ("pytest --slow tests", "pytest --slwo tests"),
        ("pytest tests/test_plan.py", "pytest tests/test_plans.py"),
        ("torchrun -m lorabook.cli run", "torchrun -m lorabook.cli rnu"),
    ],
)
def test_wrong_commands_are_found(right, wrong, pytestconfig):
    for words in commands(right):
        check_command(words, pytestconfig)
    with pytest.raises((SystemExit, Exception)):
        for words in commands(wrong):
            check_command(words, pytestconfig)


# Python


def find(node, names):
    "The object that an expression stands for, as far as that can be known without running it."
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Call):
        made = find(node.func, names)
        return made if inspect.isclass(made) else None
    if isinstance(node, ast.Attribute):
        owner = find(node.value, names)
        module = f"lorabook.{node.attr}"
        if owner is lb and node.attr not in lb.__all__ and importlib.util.find_spec(module):
            return import_module(module)
        if owner is lb or inspect.isclass(owner) and not is_dataclass(owner):
            return getattr(owner, node.attr)
        return getattr(owner, node.attr, None)
    return None


def check_names(code):
    "Names of lorabook have to exist, take these arguments, and settings have to be settings."
    tree, names = ast.parse(code), {"lb": lb, "lorabook": lb}
    names |= {name: getattr(lb, name) for name in lb.__all__}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "lorabook":
            module = import_module(node.module)
            names |= {
                alias.asname or alias.name: getattr(module, alias.name) for alias in node.names
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (found := find(node.func, names)):
            given = {keyword.arg: 0 for keyword in node.keywords if keyword.arg}
            first = [0] * inspect.ismethoddescriptor(found)
            inspect.signature(found).bind_partial(*first, *[0] * len(node.args), **given)
        elif isinstance(node, ast.Attribute):
            find(node, names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            check_setting(node.value)


def check_setting(text):
    "A setting, with its value or without."
    if re.match(r"(model|data|lora|training)\.\w+(=\S+)?$", text):
        section, name = text.split("=")[0].split(".")
        assert hasattr(getattr(lb.RunConfig(), section), name), f"no setting {text}"
        if "=" in text:
            lb.RunConfig().override(text)


PYTHON_BLOCKS = [
    (page, kind, code)
    for page, kind, code in EXAMPLES
    if kind.split(" ")[0] in PYTHON and code not in README
]


@pytest.mark.parametrize(("page", "kind", "code"), PYTHON_BLOCKS)
def test_python(page, kind, code, tmp_path, monkeypatch):
    check_names(code)
    if "norun" not in kind:
        monkeypatch.chdir(tmp_path)
        small = lb.RunConfig(output_dir=str(tmp_path)).override(*SMALL)
        monkeypatch.setattr(lb, "RunConfig", lambda: small, raising=False)
        exec(code, {})


def test_little_is_not_run():
    assert len([kind for _, kind, _ in EXAMPLES if "norun" in kind]) <= 6


def test_inline_python():
    checked = 0
    for page, kind, code in EXAMPLES:
        if kind == "inline":
            try:
                ast.parse(code)
            except SyntaxError:
                continue
            try:
                check_names(code)
                checked += 1
            except (AttributeError, TypeError, AssertionError, lb.LorabookError) as error:
                pytest.fail(f"{page}: `{code}`: {error}")
    assert checked > 100


@pytest.mark.parametrize(
    "code",
    [
        "lb.plan_memroy(cfg)",
        "lb.plan_memory(cfg, card='T4')",
        "from lorabook import plan_memroy",
        "RunConfig().override('training.max_step=3')",
        "'training.max_step'",
    ],
)
def test_wrong_names_are_found(code):
    with pytest.raises((AttributeError, TypeError, AssertionError, ValueError)):
        check_names(code)


# Data


def check_data(kind, code):
    "YAML has to be a config, JSON has to be JSON."
    if kind == "yaml":
        lb.RunConfig.from_dict(yaml.safe_load(code))
    elif kind in ("json", "jsonl"):
        for part in code.splitlines() if kind == "jsonl" else [code]:
            json.loads(part)


def test_data():
    for page, kind, code in EXAMPLES:
        try:
            check_data(kind, code)
        except ValueError as error:
            pytest.fail(f"{page}: {code}: {error}")


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("yaml", "training: {max_steps: 3}", "training: {max_stesp: 3}"),
        ("json", '{"a": 1}', '{"a": 1,}'),
        ("jsonl", '{"a": 1}\n{"b": 2}', "{'a': 1}"),
    ],
)
def test_wrong_data_is_found(kind, right, wrong):
    check_data(kind, right)
    with pytest.raises(ValueError):
        check_data(kind, wrong)


def test_languages_are_known():
    known = PYTHON | PLAIN | SHELL | DATA | {"inline"}
    others = {
        (page, kind) for page, kind, _ in EXAMPLES if kind.removesuffix(" norun") not in known
    }
    assert not others


# Guides

GUIDES = [p for p in PAGES if p.parent.name in ("guides", "recipes") and p.suffix == ".ipynb"]
OPENING = r"# .+\n\n> .+\n\n\*\*What you will learn:\*\* .+\n+\*\*What you need:\*\* .+"


@pytest.mark.parametrize("path", sorted(GUIDES), ids=lambda path: path.stem)
def test_guides(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    assert re.match(OPENING, texts[0])
    headings = [heading for text in prose(path) for heading in re.findall("^## (.+)", text, re.M)]
    assert headings[-2:] == ["Try next", "Three questions"]

    first = next(i for i, text in enumerate(texts) if "## Three questions" in text)
    last = max(i for i, text in enumerate(texts) if not text.startswith("#| hide"))
    kinds = "".join(cell["cell_type"][0] for cell in cells[first : last + 1])
    assert re.fullmatch("(mc+){3,}m?", kinds), "a question, a cell that answers it, and so on"
    for i in range(first, last + 1):
        if cells[i]["cell_type"] == "code":
            assert cells[i]["outputs"], f"no answer is saved: {texts[i]}"
        elif i < last:
            assert re.search(r"^\*.+\?\*", texts[i].split("\n\n")[-1]), texts[i]


SLOW = [path for path in sorted(GUIDES) if '"#| slow' in path.read_text(encoding="utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("path", SLOW, ids=lambda path: path.stem)
def test_slow_cells(path):
    program = shutil.which("nbdev_test", path=Path(sys.executable).parent)
    command = [program, "--flags", "slow", "--path", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
