"""The wheel holds what it should, and runs outside the clone with nothing of the clone."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser

import pytest
from conftest import ROOT


def run(*command, **settings):
    "What a command prints."
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, made from the sdist, as a release is."
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def empty(wheel, tmp_path_factory):
    "Run a command of an environment that has the wheel; of ours it sees the libraries alone."
    folder = tmp_path_factory.mktemp("empty")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", wheel, env=env)
    site = run(programs / "python", "-c", "import sysconfig as s; print(s.get_path('purelib'))")
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    with open(os.path.join(site.strip(), "libraries.pth"), "w", encoding="utf-8") as file:
        file.write("\n".join(libraries))  # whose own .pth files, of the clone, are not read
    (folder / "work").mkdir()
    settings = dict(cwd=folder / "work", env=env | {"PYTHONUTF8": "1"})
    return lambda name, *words: run(programs / name, *words, **settings)


def test_content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA")))
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lorabook").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == ours and {"lorabook/assets/model/model.safetensors"} < ours
    head, _, page = metadata.decode().partition("\n\n")
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    needs = re.findall(r"^Requires-Dist: ([^\s;]+)$", head, flags=re.M)
    assert needs == settings["DEFAULT"]["requirements"].split()
    assert "License-File: LICENSE" in head and "\nLicense" in head
    assert not re.search(r"\]\((?!https?:|#)", page), "links that lead nowhere on another page"


def test_runs_outside_the_clone(empty):
    where = empty("python", "-c", "import lorabook; print(lorabook.__file__)")
    assert "empty" in where and str(ROOT) not in where
    assert "max_steps: 3" in empty("lorabook", "config", "training.max_steps=3")
    shown = empty("lorabook", "run", "training.max_steps=3", "output_dir=out")
    assert "adapter" in shown and str(ROOT) not in shown
