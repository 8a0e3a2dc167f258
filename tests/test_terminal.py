"""A conversation in a real terminal: keys, sides, and what the terminal is never told."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch
from conftest import stir

from lorabook.config import ModelSettings
from lorabook.export.save import save_model
from lorabook.model.adapter import setup_lora
from lorabook.model.load import setup_model

CHAT = """
import sys
from lorabook import terminal

def load(*args, **kwargs):  # a model that says things to the terminal, where it means "e"
    model, tokenizer = load_adapter(*args, **kwargs)
    decode = tokenizer.decode
    tokenizer.decode = lambda *args, **kwargs: decode(*args, **kwargs).replace("e", "\\x1b[2J")
    return model, tokenizer

load_adapter, terminal.load_adapter = terminal.load_adapter, load
terminal.chat_in_terminal(sys.argv[1], max_new_tokens=5000)
"""
QUESTION = "My problem is knee pain. It has lasted 3 days. What is the symptom?"


class Terminal:
    "A program in a terminal of its own."

    def __init__(self, *command):
        self.end, inside = pty.openpty()
        environ = os.environ | {"TERM": "dumb"}
        streams = dict(stdin=inside, stdout=inside, stderr=inside)
        self.program = subprocess.Popen(command, env=environ, start_new_session=True, **streams)
        os.close(inside)
        self.shown, self.read_to = "", 0

    def type(self, text):
        os.write(self.end, text.encode())

    def wait_for(self, text, seconds=120, press=""):
        "Until something new is shown, pressing a key each second; what was shown until then."
        until = time.monotonic() + seconds
        while text not in self.shown[self.read_to :]:
            assert time.monotonic() < until, self.shown
            if select.select([self.end], [], [], 1)[0]:
                self.shown += os.read(self.end, 4096).decode()
            else:
                self.type(press)
        start, self.read_to = self.read_to, self.shown.index(text, self.read_to) + len(text)
        return self.shown[start : self.read_to]


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    "An adapter of noise, whose answers don't end."
    model, tokenizer = setup_model(cfg=ModelSettings(quantization="none"))
    model = setup_lora(model)
    torch.manual_seed(0)
    stir(model, 0.3)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("noise"), "builtin")


@pytest.fixture
def terminal(endless):
    "A conversation, at its first prompt, in the foreground of its terminal."
    foreground = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    terminal = Terminal(sys.executable, "-c", foreground + CHAT, str(endless))
    terminal.wait_for("/help")
    terminal.wait_for("> ")
    yield terminal
    terminal.program.kill()
    os.close(terminal.end)


def test_conversation(terminal):
    terminal.type("/base\n")
    terminal.wait_for("The base model answers.")
    terminal.wait_for("base> ")
    terminal.type(QUESTION + "\n")
    said = terminal.wait_for("base> ").replace(QUESTION, "")
    assert r"kn\x1b[2J\x1b[2J" in said  # knee

    terminal.type("/adapter\n")
    terminal.wait_for("The adapter answers.")
    terminal.type(QUESTION + "\n")
    terminal.wait_for(QUESTION)
    terminal.wait_for(r"\x1b[2J")  # it speaks
    terminal.type("\x03")
    terminal.wait_for("[stopped]")
    terminal.wait_for("> ")
    terminal.wait_for("[Ctrl-D or /quit ends]", press="\x03")  # nothing is to be stopped
    terminal.type("/base\n" + QUESTION + "\n")
    terminal.wait_for(r"\x1b[2J")
    terminal.wait_for("base> ")
    terminal.type("\x04")
    assert terminal.program.wait(60) == 0
    assert "\x1b[2J" not in terminal.shown


def test_no_progress_bars_in_a_log(fresh):
    code = "from lorabook.cli import main\nmain(['config'])\nfrom tqdm import tqdm\n"
    assert fresh(code + "print(tqdm([]).disable)").stdout.splitlines()[-1] == "True"
