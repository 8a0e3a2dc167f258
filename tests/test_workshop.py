"""What the files around the code say about each other and about the repository is true."""

import re
from configparser import ConfigParser
from functools import cache

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version
from versions import COLABS, bounds, name_of, oldest

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
YAML = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"]
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")]


@cache
def text(name):
    "A file of the repository."
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def settings():
    "What settings.ini says."
    found = ConfigParser(delimiters=["="])
    found.read_string(text("settings.ini"))
    return found["DEFAULT"]


def versions_of(python):
    "The versions of constraints.txt for a Python: {name: Version}."
    lines = [Requirement(line) for line in text("constraints.txt").splitlines() if line[0] != "#"]
    ours = [n for n in lines if not n.marker or n.marker.evaluate({"python_version": python})]
    assert len(ours) == len({need.name for need in ours}), "a name stands there twice"
    return {name_of(need.name): Version(str(need.specifier)[2:]) for need in ours}


def pythons():
    "The Pythons of the classifiers."
    found = re.search(r"for minor in range\((\d+), (\d+)\)", text("setup.py"))
    low, high = map(int, found.groups())
    return [f"3.{minor}" for minor in range(low, high)]


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_do_little_and_ends(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            assert re.search(r"@(v\d+|release/v1)$", step.get("uses", "@v0")), step


@pytest.mark.parametrize("path", [*WORKFLOWS, *PAGES], ids=lambda path: path.name)
def test_what_is_named_exists(path):
    found = path.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", text("Makefile"), flags=re.M)
    pieces = code(found) if path.suffix == ".md" else [found]
    named = re.findall(r"\bmake ([a-z-]+)", "\n".join(pieces))
    assert set(named) <= set(targets)
    files = re.findall(r"(?<![\w./-])((?:tests|tools|nbs|docs|benchmarks)/[\w./]+\.\w+)", found)
    new = {"nbs/35_data.mix.ipynb"}  # the example of a chapter that is not there yet
    assert {name for name in files if not (ROOT / name).exists()} <= new
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#]+)", found)
    assert all((ROOT / link).exists() for link in links)


def code(page):
    "The pieces of code in a page of Markdown."
    return re.findall(r"```.*?```|`[^`\n]+`", page, flags=re.S)


def test_versions_of_python_agree():
    jobs = yaml.safe_load(text(".github/workflows/tests.yml"))["jobs"]
    assert jobs["all"]["strategy"]["matrix"]["python"] == pythons()
    first, last = jobs["bounds"]["strategy"]["matrix"]["include"]
    assert (first["python"], first["target"]) == (pythons()[0], "test-oldest")
    assert (last["python"], last["target"]) == (pythons()[-1], "test-newest")
    assert settings()["min_python"] == pythons()[0]
    assert f'requires-python=">={pythons()[0]}"' in text("pyproject.toml")
    assert f"Python {pythons()[0]} to {pythons()[-1]}" in text("CONTRIBUTING.md")


def test_the_version_is_one():
    version = settings()["version"]
    assert yaml.safe_load(text("CITATION.cff"))["version"] == version
    assert f'__version__ = "{version}"' in text("lorabook/__init__.py")
    assert re.search(r"^## (\S+),", text("CHANGELOG.md"), flags=re.M)[1] == version


@pytest.mark.parametrize("python", pythons())
def test_what_is_tested_is_what_is_admitted(python):
    versions = versions_of(python)
    needs = [*settings()["requirements"].split(), *settings()["dev_requirements"].split()]
    for need in map(Requirement, needs):
        if version := versions.get(name_of(need.name)):
            assert version in need.specifier, need


def test_oldest():
    pins = dict(line.split("==", 1) for line in oldest() if ";" not in line)
    colab = dict(line.split("==") for line in text("tests/colab_requirements.txt").splitlines()[1:])
    pins |= {name: colab[name] for name in COLABS}
    assert {name: pins[name] for name in bounds()} == bounds()
    assert pins["pytest"] == str(versions_of("3.13")["pytest"])
    assert len(pins) == len({name_of(name) for name in pins})


def test_hooks_have_the_versions_of_the_tests():
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    pins = {pin for hook in hooks for pin in hook.get("additional_dependencies", [])}
    ours = {name: f"{name}=={version}" for name, version in versions_of("3.13").items()}
    for name in ("nbdev", "execnb", "fastcore", "ruff"):
        assert ours[name] in pins
