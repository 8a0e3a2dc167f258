"""The rules of the house, read off the source."""

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import lorabook

NUMBERS = {  # module -> number of its notebook: model.load -> 20
    match[2]: int(match[1])
    for path in (ROOT / "nbs").glob("*.ipynb")
    if (match := re.fullmatch(r"(\d+)_(.+)\.ipynb", path.name))
}
TREES = {  # module -> its syntax tree
    ".".join(path.relative_to(ROOT / "lorabook").with_suffix("").parts): ast.parse(path.read_text())
    for path in (ROOT / "lorabook").rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py", "_modidx.py")
}

VIEWS = {module for module in TREES if module.startswith("widgets.")}
VIEWS -= {"widgets.session", "widgets.kernel"}  # a script holds a session as well


def imports(module):
    "(absolute name, imported name) of each import, inside functions too."
    package = ["lorabook", *module.split(".")[:-1]]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            yield from ((source, alias.name) for alias in node.names)


def own_imports(module):
    "Modules of lorabook that a module imports."
    for source, name in imports(module):
        if source.partition(".")[0] == "lorabook":
            inside = source.removeprefix("lorabook").lstrip(".")
            found = {inside, f"{inside}.{name}".lstrip(".")} & set(TREES)
            yield from found
            assert found or (inside, name) == ("", "__version__"), f"{source} of {module}"


def test_a_notebook_for_each_module():
    assert set(NUMBERS) == set(TREES)
    assert len(set(NUMBERS.values())) == len(NUMBERS)


def test_imports_are_found():
    assert {"config", "data.source", "memory"} <= set(own_imports("run"))
    assert {"run", "config", "errors"} <= set(own_imports("cli"))


@pytest.mark.parametrize("module", sorted(TREES, key=NUMBERS.get))
def test_imports_of_a_module(module):
    for other in own_imports(module):
        assert NUMBERS[other] < NUMBERS[module], f"{module} imports {other}"
        assert other != "testing"
    for source, name in imports(module):
        assert name != "*", f"{module} imports all of {source}"
        assert source.partition(".")[0] != "ipywidgets" or module in VIEWS


@pytest.mark.parametrize("module", sorted(TREES, key=NUMBERS.get))
def test_public_names_have_docstrings(module):
    assert ast.get_docstring(TREES[module])
    for node in TREES[module].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"


@pytest.mark.parametrize("module", sorted(NUMBERS, key=NUMBERS.get))
def test_a_chapter_asserts(module):
    notebook = ROOT / "nbs" / f"{NUMBERS[module]:02}_{module}.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert any(re.search(r"^\s*(assert |test_\w+\(|with ExceptionExpected)", c, re.M) for c in code)


def test_module_is_the_command():
    words = [sys.executable, "-m", "lorabook", "--version"]
    assert subprocess.check_output(words, text=True).strip() == lorabook.__version__


def test_import_is_light(fresh):
    result = fresh("import lorabook, sys; print(*sys.modules)")
    loaded = set(result.stdout.split())
    assert "lorabook" in loaded
    assert not loaded & {"torch", "transformers", "peft", "datasets", "numpy", "ipywidgets"}


def test_a_pipe_gets_no_colours_and_no_progress_bars(fresh):
    code = "import lorabook, os; print(os.environ.get('TQDM_DISABLE'))"
    code += "\nfrom lorabook.data.chat import TokenView"
    code += "\nprint(TokenView([('Hi', 5, False, False), ('Good', 7, True, False)]))"
    lines = fresh(code).stdout.splitlines()
    assert lines[:2] == ["1", "Hi[[Good]]"]


def test_public_api():
    names = "RunConfig load_and_prepare_data setup_model setup_lora prepare_datasets create_trainer"
    names += " run_training save_model print_gpu_memory_usage show_tokens evaluate"
    names += " plan_memory device_table fit"
    assert set(names.split()) <= set(lorabook.__all__) <= set(dir(lorabook))
    assert not set(TREES) & set(lorabook.__all__)  # the module would hide the function
    for name in lorabook.__all__:
        assert getattr(lorabook, name).__doc__, name
    with pytest.raises(AttributeError, match="nonesuch"):
        lorabook.nonesuch  # noqa: B018
    with pytest.raises(AttributeError, match="Did you mean `setup_model`"):
        lorabook.setup_modl  # noqa: B018
