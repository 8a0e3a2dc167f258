"""A model that can't be had or used is refused, with the advice that fits."""

import importlib.util
import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from transformers import AutoTokenizer

from lorabook.config import ModelSettings, builtin_path
from lorabook.errors import HardwareError, ModelError
from lorabook.model.load import setup_model

ANSWERS = {  # model -> status, X-Error-Code and X-Error-Message, as the hub gives them
    "owner/gated": (401, "GatedRepo", "Access to model owner/gated is restricted."),
    "owner/gated-for-you": (403, "GatedRepo", "You are not in the authorized list."),
    "owner/misspelt": (404, "RepoNotFound", "Repository not found"),
    "owner/private": (401, "RepoNotFound", "Invalid username or password."),
    "owner/model": (404, "RevisionNotFound", "Invalid rev id: nope"),
}
ADVICE = {
    "owner/gated": ["is gated", "licence", "hf auth login"],
    "owner/gated-for-you": ["is gated", "licence", "hf auth login"],
    "owner/misspelt": ["does not exist, or is private", "spelling", "`model.name`"],
    "owner/private": ["does not exist, or is private", "hf auth login"],
    "owner/model": ["no such revision", "`model.revision`"],
}
LOAD = """
import json, time
from lorabook.config import ModelSettings
from lorabook.model.load import setup_model
time.sleep = lambda seconds: None  # huggingface_hub waits between its attempts
errors = {}
for name in NAMES:
    revision = "nope" if name == "owner/model" else None
    try: setup_model(name, cfg=ModelSettings(revision=revision))
    except Exception as error: errors[name] = [type(error).__name__, str(error)]
print("errors:" + json.dumps(errors))
"""


class FakeHub(BaseHTTPRequestHandler):
    def do_GET(self):
        status, code, message = next(
            (ANSWERS[name] for name in ANSWERS if f"/{name}/" in f"{self.path}/"), (404, "", "")
        )
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def load_from(fresh, tmp_path_factory):
    "Load models in a new process from a hub at a port of this machine: name -> (error, message)."

    def load(port, *names):
        code = LOAD.replace("NAMES", repr(names))
        home = str(tmp_path_factory.mktemp("hub"))
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HOME": home}
        result = fresh(code, **hub, no_proxy="*")
        assert "errors:" in result.stdout, result.stderr
        assert "thrown while requesting" not in result.stderr  # what the hub's library says
        return json.loads(result.stdout.partition("errors:")[2])

    return load


@pytest.fixture(scope="module")
def errors(load_from):
    "What came of loading each model in `ANSWERS`."
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield load_from(server.server_port, *ANSWERS)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ADVICE)
def test_answer_of_the_hub(name, errors):
    kind, message = errors[name]
    assert kind == "ModelError"
    for part in (repr(name), "\n  found: ", "\n  to do: ", *ADVICE[name]):
        assert part in message
    assert "network" not in message


def test_no_network(load_from):
    with socket.socket() as closed:  # bound, and not listening
        closed.bind(("127.0.0.1", 0))
        kind, message = load_from(closed.getsockname()[1], "owner/model")["owner/model"]
    assert kind == "ModelError"
    for part in ("'owner/model'", "the hub can't be reached", "Check the network"):
        assert part in message


def test_hub_switched_off(refused):
    with refused(ModelError, "'owner/model'", "switched off", "HF_HUB_OFFLINE"):
        setup_model("owner/model")


@pytest.mark.parametrize("name", ["a/b/c", "./nowhere", "/nowhere/at/all", "two words"])
def test_no_such_folder(name, refused):
    with refused(ModelError, repr(name), "neither a folder nor a hub id"):
        setup_model(name)


@pytest.fixture
def folder(tmp_path):
    "A copy of the built-in model, to be damaged."
    return shutil.copytree(builtin_path("model"), tmp_path / "model")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<word{i}>" for i in range(5)])
    tokenizer.save_pretrained(folder)


def cut_weights(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])


DAMAGE = {  # kind -> what is done to the folder, what the message holds
    "tokenizer with more tokens": (add_tokens, "1029 tokens, 1024 rows"),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "weights cut short": (lambda f: cut_weights(f, 100_000), "damaged weights", "download"),
    "empty weights": (lambda f: cut_weights(f, 0), "damaged weights", "download"),
    "pointer to weights": (
        lambda f: (f / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1"
        ),
        "damaged weights",
        "download",
    ),
    "weights of other sizes": (lambda f: change_config(f, vocab_size=2048), "can't be loaded"),
    "weights of some layers": (lambda f: change_config(f, num_hidden_layers=6), "layers.4"),
    "unknown architecture": (lambda f: change_config(f, model_type="nonesuch"), "nonesuch"),
    "not a causal model": (lambda f: change_config(f, model_type="t5"), "T5Config"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("case", DAMAGE.values(), ids=DAMAGE)
def test_damaged_folder(case, folder, refused):
    damage, *parts = case
    damage(folder)
    with refused(ModelError, str(folder), *parts):
        setup_model(str(folder), cfg=ModelSettings(quantization="none"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_not_run(file, folder, refused):
    ran = folder / "ran"
    (folder / "custom.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    changes = {
        "config.json": {
            "model_type": "custom",
            "auto_map": {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "T",
            "auto_map": {"AutoTokenizer": ["custom.T", "custom.T"]},
        },
    }
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes[file]))
    with refused(ModelError, str(folder), "Python code", "`model.trust_remote_code: true`"):
        setup_model(str(folder))
    assert not ran.exists()
    with pytest.raises(ModelError):  # the file has none of the classes
        setup_model(str(folder), cfg=ModelSettings(trust_remote_code=True))
    assert ran.exists()


@pytest.fixture
def no_bitsandbytes(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lorabook.hardware.importlib.util.find_spec",
        lambda name, *args: None if name == "bitsandbytes" else find(name, *args),
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantization_without_bitsandbytes(kind, no_bitsandbytes, refused):
    with refused(HardwareError, f"`{kind}`", "bitsandbytes is not installed", "pip install"):
        setup_model(cfg=ModelSettings(quantization=kind))


def test_auto_without_bitsandbytes(no_bitsandbytes):
    model, _ = setup_model(cfg=ModelSettings(quantization="auto"))
    assert not getattr(model, "is_quantized", False)
