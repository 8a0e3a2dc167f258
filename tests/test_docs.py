"""The docs site builds from the notebooks, with warnings as errors."""

import subprocess
import sys

from conftest import ROOT


def test_build():
    command = [sys.executable, ROOT / "docs" / "build.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert (ROOT / "_docs" / "index.html").exists()
