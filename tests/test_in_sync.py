"""The package is what the notebooks export, the notebooks are clean, the README is current."""

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBDEV = Path(sys.executable).parent


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A copy of the sources alone, in which nbdev exported and cleaned."""
    copy = tmp_path_factory.mktemp("fresh") / ROOT.name
    shutil.copytree(
        ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "outputs")
    )
    for file in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / file, copy)
    (copy / "lorabook").mkdir()
    for file in ("__init__.py", "__main__.py"):  # kept by hand
        shutil.copy(ROOT / "lorabook" / file, copy / "lorabook")
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([NBDEV / command], cwd=copy, check=True, capture_output=True)
    return copy


def files(folder, pattern):
    """Relative paths below a folder."""
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob(pattern)
        if not {".ipynb_checkpoints", "outputs", "__pycache__"} & set(path.parts)
    )


@pytest.mark.parametrize("folder, pattern", [("lorabook", "*.py"), ("nbs", "*.ipynb")])
def test_in_sync(fresh, folder, pattern):
    here, there = ROOT / folder, fresh / folder
    assert files(here, pattern) == files(there, pattern), "run nbdev_export; delete stale modules"
    _, differ, missing = filecmp.cmpfiles(here, there, files(here, pattern), shallow=False)
    assert not differ and not missing, "run nbdev_export and nbdev_clean"


def test_readme_is_current():
    done = subprocess.run([sys.executable, ROOT / "tools" / "make_readme.py", "--check"])
    assert done.returncode == 0, "run `make readme`"
