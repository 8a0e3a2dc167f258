"""What is served is what was trained: the prompt by Go, and the answers by a server."""

import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
from chat_templates import SHAPES
from conftest import stir
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabook.config import ModelSettings
from lorabook.errors import TemplateError
from lorabook.export.merge import merge_adapter
from lorabook.export.ollama import Frame, ollama_template, write_go
from lorabook.export.save import save_model
from lorabook.export.serve import how_to_serve
from lorabook.infer.generate import generate
from lorabook.model.adapter import setup_lora
from lorabook.model.load import setup_model, setup_tokenizer
from lorabook.testing import render_go

SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [
    {"role": "user", "content": "What is {{ .System }}?"},
    {"role": "assistant", "content": '"It" is 4.\n\n(2 + 2)'},
    {"role": "user", "content": "Sûr? \U0001f600"},
]
REFUSED = {
    "system last",  # the system prompt stands behind the conversation
    "filters",  # words are changed
}


def test_templates_by_go():
    "What is written for Ollama says what the chat template says, or is refused."
    tokenizer = setup_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    templates = {"builtin": tokenizer.chat_template}
    templates |= {name: shape.template for name, shape in SHAPES.items()}
    cases, wanted, refused = [], [], set()
    for name, template in templates.items():
        tokenizer.chat_template = template
        try:
            written = ollama_template(tokenizer)
        except TemplateError:
            refused.add(name)
            continue
        for talk in (TALK[:1], TALK, [SYSTEM, *TALK], [SYSTEM, *TALK[:1]]):
            if talk[0] is SYSTEM and name in SHAPES and not SHAPES[name].system:
                continue
            cases.append((written.text, talk))
            options = dict(tokenize=False, add_generation_prompt=True)
            wanted.append(tokenizer.apply_chat_template(talk, **options))
    assert refused == REFUSED
    assert render_go(cases) == wanted


marks = st.text(
    st.sampled_from(list('{}"\\-%`\n\t\r <|s>é\u3000\u200b\U0001f600\U000e0001')), max_size=8
)
frames = st.builds(
    Frame, *[marks] * 6, st.sampled_from(["turn", "first", "last", "none"]), marks, marks
)


@given(st.lists(frames, min_size=150, max_size=150))
@settings(max_examples=1)
def test_any_marks_by_go(frames):
    "A frame says the same in Python and in Go, whatever the marks are."
    cases = [(frame, talk) for frame in frames for talk in (TALK, [SYSTEM, *TALK])]
    texts = [write_go(frame) for frame, _ in cases]
    assert not any('"""' in text for text in texts)
    told = render_go([(text, talk) for text, (_, talk) in zip(texts, cases)])
    assert told == [frame.write(talk) for frame, talk in cases]


def free_port():
    "A port that nobody listens on."
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextmanager
def served(folder):
    "Serve a model by the printed line; the ways to serve it, by name."
    port = free_port()
    ways = {way.name: way for way in how_to_serve(folder, port).ways}
    command = shlex.split(ways["transformers"].lines[0])
    command[0] = str(Path(sys.executable).with_name(command[0]))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            wait_until_healthy(server, port)
            yield ways
        finally:
            server.kill()


def wait_until_healthy(server, port):
    "Until the server answers."
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/health") as reply:
                return json.load(reply)
        except OSError:
            assert server.poll() is None, server.stdout.read().decode()
            time.sleep(0.2)
    raise AssertionError("the server does not answer")


def test_served(tmp_path, capsys):
    "The server of transformers, started and asked as printed, answers as the adapter does."
    model, tokenizer = setup_model(cfg=ModelSettings(quantization="none"))
    model = setup_lora(model)
    torch.manual_seed(0)
    stir(model, 0.01)
    adapter = save_model(model, tokenizer, tmp_path, "builtin")
    merged = merge_adapter(adapter, tmp_path / "a model", dtype="float32", check=False)
    question = "My problem is knee pain. It has lasted 3 days. What is the symptom?"
    (wanted,) = generate(model, tokenizer, [question], max_new_tokens=1024)
    with model.disable_adapter():
        assert wanted not in (generate(model, tokenizer, [question])[0], "")
    with served(merged.folder) as ways:
        exec("\n".join(ways["Ask one of them"].lines).replace("Hello", question), {})
    assert capsys.readouterr().out.rstrip("\n") == wanted
