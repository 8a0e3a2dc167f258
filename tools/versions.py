"""Constraints for pip that take the oldest libraries of settings.ini: python tools/versions.py

Each library is held at its lower bound; the development tools stay at what constraints.txt says,
and what is Colab's, which the tests have in a folder of its own.
`make test-oldest` runs the tests with them.
"""

import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLABS = {"ipywidgets"}  # Colab alone draws its oldest: tests/colab_requirements.txt


def name_of(requirement):
    "The name in `name>=1.2`, written as pip compares it."
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def bounds():
    "The libraries that lorabook needs: {name: lower bound}."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(need.split(">=") for need in settings["DEFAULT"]["requirements"].split())


def oldest():
    "The lines of a constraints file."
    pins = [f"{name}=={version}" for name, version in bounds().items() if name not in COLABS]
    names = {name_of(pin) for pin in pins}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return pins + [line for line in lines if line[:1].isalpha() and name_of(line) not in names]


if __name__ == "__main__":
    print("\n".join(oldest()))
