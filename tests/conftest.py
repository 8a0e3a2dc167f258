"""For all tests: no network, one thread, no cache left behind; and what several files need."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="lorabook-tests-")
os.environ["HF_DATASETS_CACHE"] = os.path.join(_CACHE.name, "datasets")
os.environ["HF_MODULES_CACHE"] = os.path.join(_CACHE.name, "modules")  # goes onto the module path

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from notebooks import chromium, kernel, lab, open_notebook  # noqa: E402, F401

# The same examples in every run: what fails, fails for everyone, and a slow machine is no failure.
settings.register_profile(
    "lorabook",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("lorabook")

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also what takes many minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only with --slow")


LONGEST = (
    "test_docs",
    "test_processes",
    "test_survive",
    "test_end_to_end",
    "test_sweep",
    "test_notebooks",
)


def pytest_collection_modifyitems(config, items):
    "The longest files first: then two processes that share the files end at about the same time."
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pytest --slow runs it"))


@pytest.fixture(scope="session")
def root():
    "The repository."
    return ROOT


@pytest.fixture(scope="session")
def hundred():
    "Write a hundred of the built-in conversations into a folder; the name of the file."

    def write(folder):
        lines = (ROOT / "lorabook/assets/intake_notes.jsonl").read_text(encoding="utf-8")
        path = folder / "hundred.jsonl"
        path.write_text("\n".join(lines.splitlines()[:100]), encoding="utf-8")
        return path.name

    return write


@pytest.fixture(scope="session")
def thirty(tmp_path_factory):
    "A file of thirty short conversations, of which a run has several epochs."
    path = tmp_path_factory.mktemp("thirty") / "rows.jsonl"
    lines = [
        {"instruction": f"What is {i} plus {i}?", "response": f"It is {2 * i}." * (i % 5 + 1)}
        for i in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def stir(model, std):
    "Give every weight of an adapter a gradient, and the adapter something to say."
    from torch.nn.init import normal_

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            normal_(parameter, std=std)
    return model


@pytest.fixture(scope="session")
def builtin():
    "The built-in model, not quantized, and its tokenizer; not to be changed."
    from lorabook.config import ModelSettings
    from lorabook.model.load import setup_model

    return setup_model(cfg=ModelSettings(quantization="none"))


@pytest.fixture(scope="session")
def refused():
    "A context: the code inside raises `kind`, in three parts, and the message holds every part."

    @contextmanager
    def context(kind, *parts):
        with pytest.raises(kind) as caught:
            yield
        message = str(caught.value)
        for part in ("\n  found: ", "\n  to do: ", *parts):
            assert part in message, f"{part!r} is not in:\n{message}"

    return context


@pytest.fixture(scope="session")
def fresh():
    "Run Python code in a new process, with arguments and more environment."

    def run(code, *args, **env):
        command = [sys.executable, "-c", code, *args]
        return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)

    return run
