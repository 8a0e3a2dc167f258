"""`lorabook app`: what it serves, and to whom."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from voila import app as voila

from lorabook.app import _server
from lorabook.cli import main
from lorabook.errors import LorabookError

START = """
import sys
import lorabook.app, lorabook.cli
lorabook.app.CELL = "import os; print(6 * 7, os.getcwd())"
sys.exit(lorabook.cli.main(sys.argv[1:]))
"""


GUIDE = "import sys, lorabook.cli; sys.exit(lorabook.cli.main(sys.argv[1:]))"  # as it is


@contextmanager
def served(folder, *arguments, start=START):
    "The command in a process of its own: (its address, the host and token that it says, itself)."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", start, "app", "--no-browser", "--port", str(port)]
    homes = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    process = subprocess.Popen(
        [*command, *arguments],
        env=os.environ | homes | {"IPYTHONDIR": str(folder / "ipython")},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        host, token = re.fullmatch(rf"http://(\S+):{port}/\?token=(\S+)", url).groups()
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}", host, token, process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def listens(host, port):
    "Whether something does."
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


def wait_for(port, process):
    "Until it listens."
    while not listens("127.0.0.1", port):
        assert process.poll() is None, "it has ended"
        time.sleep(0.1)


def get(url):
    "(status, last address, text) of a page."
    try:
        with urllib.request.urlopen(url, timeout=60) as page:
            return page.status, page.url, page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, url, error.read().decode()


@pytest.mark.parametrize("arguments", [(), ("--host", "0.0.0.0")])
def test_only_with_the_token(tmp_path, arguments):
    with served(tmp_path, *arguments) as (url, host, token, process):
        assert host == (socket.gethostname() if arguments else "127.0.0.1")
        assert len(token) >= 32
        for wrong in ("", "?token=", "?token=wrong", f"?token={token[:-1]}"):
            status, page, text = get(f"{url}/{wrong}")
            assert "/login" in page and "kernelId" not in text, wrong
        assert get(f"{url}/api/kernels/{'0-0-0-0-0'}")[0] == 403
        status, page, text = get(f"{url}/?token={token}")
        assert status == 200 and "/login" not in page
        assert f"42 {tmp_path}" in text  # the cell has run, in the folder of the user
        if sys.platform == "linux":  # where every 127.x is this machine
            port = int(url.rpartition(":")[2])
            assert listens("127.0.0.2", port) == bool(arguments)
    assert process.returncode == 0


def test_no_token_no_server(tmp_path, monkeypatch, refused):
    voila.Voila.clear_instance()
    deaf = lambda self, arguments: None  # as a Voilà that doesn't know the argument
    monkeypatch.setattr(voila.Voila, "initialize", deaf)
    path = tmp_path / "a.ipynb"
    path.write_text("{}")
    with refused(LorabookError, "open to everyone"):
        _server(str(path), "127.0.0.1", 8866, "secret")
    voila.Voila.clear_instance()


def test_arguments(monkeypatch, capsys):
    got = []
    monkeypatch.setattr("lorabook.cli.serve_app", lambda *given: got.append(given))
    assert main(["app"]) == 0
    assert main(["app", "--host", "0.0.0.0", "--port", "9", "--no-browser"]) == 0
    assert got == [("127.0.0.1", 8866, True), ("0.0.0.0", 9, False)]
    with pytest.raises(SystemExit):
        main(["app", "config.yaml"])
    assert "unrecognized arguments: config.yaml" in capsys.readouterr().err


def test_guided_run(tmp_path, chromium, hundred):
    data = hundred(tmp_path)
    with served(tmp_path, start=GUIDE) as (url, host, token, process):
        page, problems = chromium.new_page(), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m) if m.type == "error" else None)
        page.goto(f"{url}/?token={token}", wait_until="commit", timeout=60_000)
        page.locator(".lb-live h3 >> text=8. Take it home").wait_for(timeout=60_000)
        assert page.locator(".lb-live h3").count() == 8
        assert page.locator(".lb-copy").locator("visible=true").count() == 0
        small = {"data.train_file": data, "training.max_steps": 400, "training.batch_size": 2}
        for name, value in (small | {"training.gradient_accumulation_steps": 1}).items():
            field = page.get_by_label(name, exact=True).locator("visible=true").last
            field.fill(str(value))
            field.press("Tab")
            page.get_by_text(f"'{name}={value}'").first.wait_for()
        page.locator("button.lb-start").click()
        state = ".lb-live .lb-state[data-state={}]"
        page.locator(state.format("training")).wait_for(timeout=60_000)
        page.locator(".lb-live .lb-chart").first.wait_for(timeout=60_000)
        page.locator("button.lb-stop >> text=Stop and keep").click()
        page.locator(state.format("stopped")).wait_for(timeout=60_000)
        page.locator(".lb-live td >> text=exact match").wait_for(timeout=60_000)
        if folder := os.environ.get("LORABOOK_PICTURES"):
            page.screenshot(path=os.path.join(folder, "app.png"), full_page=True)
        page.close()
    fonts = "https://cdn.jsdelivr.net/npm/@fortawesome/"  # Voilà's own page asks for its icons
    assert not [
        p for p in problems if not getattr(p, "location", {"url": ""})["url"].startswith(fonts)
    ]
    assert list(tmp_path.glob("outputs/guided/*/adapter_model.safetensors"))
