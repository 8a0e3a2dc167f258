"""The Chromium of the tests and the pictures: python tools/browser.py

Prints the path of one that works. Where there is none it gets one first: the system's package
where apt-get may (as root, or with a sudo that asks nothing), else Playwright's download.
"""

import os
import shutil
import subprocess
import sys

from playwright.sync_api import sync_playwright

NAMES = "chromium", "chromium-browser", "google-chrome"
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS = [*FLAGS.split(), "--disable-component-update", "--disable-sync"]


def run(*command):
    "What a command prints, or None and a line about why it failed."
    try:
        pipes = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
        done = subprocess.run(command, check=True, **pipes)  # nosec B603 # commands of this file
        return done.stdout
    except (OSError, subprocess.SubprocessError) as error:
        last = (getattr(error, "stderr", None) or "").strip().splitlines()[-1:]
        print(f"{error} {' '.join(last)}", file=sys.stderr)


def find():
    "The path of a browser that starts, or None; some systems have a stub of that name."
    with sync_playwright() as playwright:
        paths = [*filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path]
    works = lambda path: os.path.exists(path) and "Chrom" in (run(path, "--version") or "")
    return next(filter(works, paths), None)


def get():
    "The path of a browser, which is installed if need be."
    if path := find():
        return path
    print("No Chromium was found; installing one.", file=sys.stderr)
    if shutil.which("apt-get"):
        apt = [*(["sudo", "-n"] if os.geteuid() else []), "apt-get", "-qq"]
        run(*apt, "update")
        run(*apt, "install", "-y", "--no-install-recommends", "chromium")
    if not find():
        run(sys.executable, "-m", "playwright", "install", "chromium")
    return find() or sys.exit("No Chromium could be installed; the lines above say why.")


if __name__ == "__main__":
    print(get())
