"""Notebooks in real kernels, and in JupyterLab in a real browser: fixtures for tests."""

import ast
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import browser
import nbformat
import pytest
from jupyter_client import KernelManager
from playwright.sync_api import sync_playwright

STACKS = {"new": [], "colab": [str(Path(sys.prefix) / "colab")]}  # first on a kernel's path


def environment(folder, *first):
    "An environment in which nothing of this user's Jupyter is read or written."
    names = "HOME IPYTHONDIR JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR"
    names += " JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR"
    paths = [*first, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {name: str(folder / name.lower()) for name in names.split()}
    return os.environ | own | {"PYTHONPATH": os.pathsep.join(paths)}


def wait_until(ready, seconds=30):
    "Ask again and again until the answer is true, and return that."
    end = time.monotonic() + seconds
    while not (answer := ready()):
        assert time.monotonic() < end, f"waited for {seconds} s"
        time.sleep(0.01)
    return answer


def checked(outputs, error=None):
    "The outputs, if they hold the error that is expected, or none where none is."
    errors = [output for output in outputs if output.output_type == "error"]
    report = "\n".join(line for output in errors for line in output.traceback)
    assert [output.ename for output in errors] == ([error] if error else []), report
    return outputs


class Kernel:
    "A kernel, spoken to as JupyterLab does. `models` is what its widgets show: {id: state}."

    def __init__(self, client, interrupt):
        self.client, self.interrupt = client, interrupt
        self.outputs, self.displays, self.models, self.idle = {}, {}, {}, set()
        self.subshell = None  # the way to the widgets, where a kernel has it
        if "kernel subshells" in self._control("kernel_info_request").get("supported_features", []):
            self.subshell = self._control("create_subshell_request")["subshell_id"]

    def execute_async(self, code):
        "Start a cell; returns its id."
        return self.client.execute(code)

    def finish(self, cell, error=None, seconds=60):
        "Wait for a cell; returns its outputs. `error` is the name of the one it must end in."
        wait_until(lambda: self.read() or cell in self.idle, seconds)
        outputs = self.outputs[cell]
        if any(output.output_type == "error" for output in outputs):
            wait_until(self._answers)  # at first it turns away what comes
        return checked(outputs, error)

    def execute(self, code, error=None, seconds=60):
        "Run a cell; returns its outputs."
        return self.finish(self.execute_async(code), error, seconds)

    def evaluate(self, expression):
        "The value of an expression: numbers, strings, and lists and dicts of them."
        return ast.literal_eval(self.execute(expression)[-1].data["text/plain"])

    def find(self, css_class, seconds=30):
        "The id of the widget that has a CSS class, waiting for it."
        known = lambda: [i for i in self.models if css_class in self.state(i)["_dom_classes"]]
        return wait_until(known, seconds)[-1]

    def state(self, model_id):
        "What a widget shows now."
        self.read()
        return {"_dom_classes": [], **self.models[model_id]}

    def send_click(self, model_id):
        "Click a button."
        self._send(model_id, {"method": "custom", "content": {"event": "click"}})

    def set_value(self, model_id, value, name="value"):
        "Set a trait of a widget, as a user does who moves a slider or types a text."
        data = {"method": "update", "state": {name: value}, "buffer_paths": []}
        self._send(model_id, data)

    def read(self):
        "Take in what the kernel has published since."
        while self.client.iopub_channel.msg_ready():
            message = self.client.get_iopub_msg(timeout=1)
            kind, content = message["msg_type"], message["content"]
            cell = message["parent_header"].get("msg_id")
            outputs = self.outputs.setdefault(cell, [])
            if kind in ("stream", "display_data", "execute_result", "error"):
                outputs.append(nbformat.v4.output_from_msg(message))
                if display := content.get("transient", {}).get("display_id"):
                    self.displays[display] = outputs[-1]
            elif kind == "update_display_data":
                shown = self.displays[content["transient"]["display_id"]]
                shown.update(nbformat.from_dict({k: content[k] for k in ("data", "metadata")}))
            elif kind == "clear_output":
                outputs.clear()
            elif kind == "comm_open":
                self.models[content["comm_id"]] = dict(content["data"].get("state", {}))
            elif kind == "comm_msg" and content["data"].get("method") == "update":
                self.models[content["comm_id"]].update(content["data"]["state"])
            elif kind == "status" and content["execution_state"] == "idle":
                self.idle.add(cell)

    def _answers(self):
        "Whether a cell that is sent now is run, within 5 s."
        cell, end = self.execute_async("0"), time.monotonic() + 5
        while cell not in self.idle and time.monotonic() < end:
            self.read()
            time.sleep(0.01)
        return self.outputs.get(cell)

    def _send(self, model_id, data):
        message = self.client.session.msg("comm_msg", {"comm_id": model_id, "data": data})
        if self.subshell:
            message["header"]["subshell_id"] = self.subshell
        self.client.shell_channel.send(message)

    def _control(self, kind):
        message = self.client.session.msg(kind, {})
        self.client.control_channel.send(message)
        while True:
            reply = self.client.get_control_msg(timeout=30)
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                return reply["content"]


@contextmanager
def kernel_of(stack, folder):
    "A kernel of one of the stacks, whose files are in a folder."
    assert all(map(os.path.isdir, STACKS[stack])), "remove .venv/.dev; `make test` makes the folder"
    manager = KernelManager()
    manager.start_kernel(env=environment(folder, *STACKS[stack]), cwd=str(folder))
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        yield Kernel(client, manager.interrupt_kernel)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture(params=list(STACKS))
def kernel(request, tmp_path):
    "A `Kernel`, of each stack in turn."
    with kernel_of(request.param, tmp_path) as kernel:
        yield kernel


SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false"},
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are there too
}
LAB = "--no-browser --allow-root --ServerApp.ip=127.0.0.1 --ServerApp.port=0"
LAB += " --LabApp.expose_app_in_browser=True"
LAB += " --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
PANEL = "window.jupyterapp?.shell?.currentWidget"
DO = """name => {
    window.done = {...window.done, [name]: false}
    jupyterapp.commands.execute(name).finally(() => window.done[name] = true)
}"""


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A JupyterLab server: (its folder, its address, its token)."
    folder = tmp_path_factory.mktemp("lab")
    env, root, log = environment(folder), folder / "root", folder / "log"
    root.mkdir()
    for name, values in SETTINGS.items():
        path = Path(env["JUPYTERLAB_SETTINGS_DIR"], f"@jupyterlab/{name}.jupyterlab-settings")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    command = [sys.executable, "-m", "jupyterlab", *LAB.split(), f"--ServerApp.root_dir={root}"]
    with log.open("w") as err, subprocess.Popen(command, env=env, stderr=err) as server:
        try:
            file = Path(env["JUPYTER_RUNTIME_DIR"], f"jpserver-{server.pid}.json")
            written = lambda: file.exists() and file.read_text().rstrip().endswith("}")
            wait_until(lambda: written() or server.poll() is not None, 60)
            assert server.poll() is None, log.read_text()
            about = json.loads(file.read_text())
            yield root, about["url"], about["token"]
        finally:
            server.kill()  # it may hang when asked; kernels end without it


@pytest.fixture(scope="module")  # not longer: asyncio is in use in this thread meanwhile
def chromium():
    "A browser. Where there is none, its tests are skipped; with LORABOOK_NEED_BROWSER they fail."
    path = browser.find()
    if not path:
        no = pytest.fail if os.environ.get("LORABOOK_NEED_BROWSER") else pytest.skip
        no("There is no Chromium; `python tools/browser.py` gets one, or says why it can't.")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=[*browser.FLAGS, OFFLINE])
        yield chromium.new_context()  # one for all pages: what they load is kept
        chromium.close()


class Notebook:
    "A notebook that is open in JupyterLab. `page` is Playwright's."

    def __init__(self, page, lab, path):
        self.page, self.path, self.problems, self.begun = page, path, [], time.monotonic()
        page.on("pageerror", self._note)
        page.on("console", lambda m: self._note(m.text) if m.type == "error" else None)
        page.on("request", lambda request: self._ours(request.url))
        page.on("websocket", lambda socket: self._ours(socket.url))
        page.goto(f"{lab[1]}lab/tree/{path.name}?reset&token={lab[2]}")

    def _note(self, problem):
        self.problems.append(f"after {time.monotonic() - self.begun:.1f} s: {problem}")

    def _ours(self, url):
        if urlsplit(url).hostname not in (None, "localhost", "127.0.0.1"):
            self._note(f"asks {url}")

    def do(self, command, seconds=60, wait=True):
        "Run a command of JupyterLab, and wait for its end."
        self.page.evaluate(DO, command)
        if wait:
            self.page.wait_for_function(f"window.done['{command}']", timeout=1000 * seconds)

    def wait_idle(self, seconds=60):
        "Wait until the kernel is connected and idle, and has told the page of its widgets."
        kernel = f"{PANEL}?.sessionContext?.session?.kernel"
        ready = f"{kernel}?.connectionStatus == 'connected' && {kernel}.status == 'idle'"
        self.page.wait_for_function(ready, timeout=1000 * seconds)
        for _ in range(2):  # the page asks twice; this is answered after each of its questions
            self.page.evaluate(f"{kernel}.requestCommInfo({{}})")

    def start(self):
        "Run all cells, and do not wait."
        self.do("notebook:run-all-cells", wait=False)

    def finish(self, error=None, seconds=60):
        "Wait for the cells that were started. `error` is the name of the one they must end in."
        self.page.wait_for_function("window.done['notebook:run-all-cells']", timeout=1000 * seconds)
        return checked(self.outputs(), error)

    def run_all(self, error=None, seconds=60):
        "Run all cells; returns their outputs."
        self.start()
        return self.finish(error, seconds)

    def content(self):
        "The notebook as it is now in the browser."
        return nbformat.from_dict(self.page.evaluate(f"{PANEL}.content.model.toJSON()"))

    def outputs(self):
        "The outputs of all cells, in one list."
        return [output for cell in self.content().cells for output in cell.get("outputs", [])]

    def click(self, selector):
        "Click what a CSS selector finds: `button.lb-stop`."
        self.page.locator(selector).click()

    def interrupt(self):
        "Interrupt the kernel."
        self.do("notebook:interrupt-kernel")

    def save(self):
        "Save the file, and return what is in it."
        self.do("docmanager:save")
        return nbformat.read(self.path, as_version=4)

    def screenshot(self, path):
        "A picture of the cells."
        self.page.locator(".jp-Notebook").screenshot(path=path)


@pytest.fixture
def open_notebook(lab, chromium):
    "Opens a file, or a list of cells, with a kernel; or without one, as a stranger sees it."
    opened = []

    def open_one(source, kernel=True, width=1400, height=1400):
        path = lab[0] / f"{len(list(lab[0].glob('*.ipynb')))}.ipynb"
        if isinstance(source, list):
            cells = [nbformat.v4.new_code_cell(cell) for cell in source]
            notebook = nbformat.v4.new_notebook(cells=cells)
        else:
            notebook = nbformat.read(source, as_version=4)
        name, language = ("python3", "python") if kernel else ("none", "none")
        notebook.metadata["kernelspec"] = dict(name=name, display_name=name, language=language)
        notebook.metadata["language_info"] = dict(name=language)
        nbformat.write(notebook, path)
        page = chromium.new_page()
        page.set_viewport_size(dict(width=width, height=height))
        opened.append(Notebook(page, lab, path))
        if kernel:
            opened[-1].wait_idle()
        else:
            opened[-1].click(".jp-Dialog button.jp-mod-reject")  # "No Kernel"
        return opened[-1]

    yield open_one
    problems = [problem for notebook in opened for problem in notebook.problems]
    for notebook in opened:
        notebook.page.evaluate(f"{PANEL}?.sessionContext?.shutdown()")
        notebook.page.close()
    assert not problems, problems
