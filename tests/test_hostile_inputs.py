"""Files and settings by strangers: each ends in the right error, in bounded time, and runs nothing.

`test_bad_data`, `test_bad_config` and `test_hub_errors` have what is wrong by mistake; here is what
is wrong on purpose. No input may leave a file or a process behind; the fixture `unharmed` looks.
"""

import json
import os
import pickle
import resource
import shutil
import struct
import sys

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from lorabook.config import DataSettings, ModelSettings, RunConfig, builtin_path
from lorabook.data.chat import encode_chat
from lorabook.data.source import load_and_prepare_data
from lorabook.data.template import prompt_text
from lorabook.errors import (
    ConfigError,
    DataError,
    LorabookError,
    ModelError,
    SandboxError,
    TemplateError,
)
from lorabook.export.save import adapter_name
from lorabook.model.load import load_config, setup_model
from lorabook.train.checkpoint import only_run

TOKEN = "hf_" + "abcDEF123" * 4
SECONDS, BYTES = 20, 2**30  # of CPU and of memory on top, on a slow machine; most need next to none


def files(folder):
    return {path: path.stat().st_size for path in folder.rglob("*")}


@pytest.fixture
def unharmed(tmp_path):
    "What is in the folder when this is called is all that is in it afterwards."
    seen, children = [], psutil.Process().children(recursive=True)
    clock = resource.getrusage(resource.RUSAGE_SELF)
    yield lambda: seen.append(files(tmp_path))
    spent = resource.getrusage(resource.RUSAGE_SELF)
    assert spent.ru_utime + spent.ru_stime - clock.ru_utime - clock.ru_stime < SECONDS
    unit = 1 if sys.platform == "darwin" else 1024
    assert (spent.ru_maxrss - clock.ru_maxrss) * unit < BYTES
    assert psutil.Process().children(recursive=True) == children
    assert not seen or files(tmp_path) == seen[0]


class Act:
    "What a pickle does when it is read."

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


YAML = {  # kind -> text, parts of the message
    "billion laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "alias", "*a, line 2"),
    "a list that holds itself": ("&a [*a]", "alias", "*a"),
    "merged mapping": ("versions: &x {r: a}\nlora: {<<: *x}", "alias", "*x"),
    "deep lists": ("[" * 50_000, "too deep", "recursion"),
    "deep mappings": ("{a: " * 20_000, "too deep", "recursion"),
    "number of 5,000 digits": ("lora: {r: " + "9" * 5000 + "}", "too large", "digits"),
    "number in base 16": ("seed: 0x" + "f" * 50_000, "too large", "line 1"),
    "number in base 60": ("seed: 1" + ":59" * 9000, "too large", "line 1"),
    "large number": ("lora: {r: " + "9" * 15 + "}", "`lora.r`", "less than"),
    "endless number": ("training: {weight_decay: 1e999}", "`training.weight_decay`", "finite"),
    "no date": ("seed: 2001-99-99", "no date", "month"),
    "null byte": ("seed: \0", "not valid YAML", "#x0000"),
    "call": ("seed: !!python/object/apply:os.system [true]", "not valid YAML", "os.system"),
    "too long": ("output_dir: " + "a" * 300_000, "too long", "200,000"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(4000)), "4000 values are wrong", "`k0`"),
    "token": (f"training: {{hub_token: {TOKEN}}}", "`training.hub_token`", "hf auth login"),
    "token under another name": (f"model: {{token: {TOKEN}}}", "`model.token`", "***"),
}


@pytest.mark.parametrize("case", YAML.values(), ids=YAML)
def test_yaml(case, tmp_path, unharmed):
    text, *parts = case
    path = tmp_path / "run.yaml"
    path.write_text(text)
    unharmed()
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(path)
    for part in parts:
        assert part in str(caught.value)
    assert TOKEN not in str(caught.value) and len(str(caught.value)) < 20_000


def chat(**more):
    told = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | more]
    return json.dumps({"messages": told})


def call(arguments):
    return chat(tool_calls=[{"name": "f", "arguments": {"x": "X"}}]).replace('"X"', arguments)


def parquet(**columns):
    return lambda path: pq.write_table(pa.table(columns), path, compression="zstd")


BROKEN = pa.StringArray.from_buffers(
    1, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")
)
DEEP = 900 if sys.version_info < (3, 13) else 2000  # lists; Python 3.13 reads 900
DATA = {  # kind -> file name, content or what writes it, parts of the message
    "deep list": ("a.jsonl", "[" * 100_000, "line 1", "nested too deeply"),
    "deep object": ("a.json", '{"a":' * 100_000, "a.json", "nested too deeply"),
    "deep arguments": ("a.jsonl", call("[" * DEEP + "]" * DEEP), "line 1", "nested too deeply"),
    "number of 5,000 digits": ("a.jsonl", call("9" * 5000), "line 1", "too large"),
    "number of 5,000 digits in a list": ("a.json", f"[{'9' * 5000}]", "a.json", "too large"),
    "endless number": ("a.jsonl", call("1e999"), "line 1, message 2", "JSON can't hold"),
    "no number": ("a.jsonl", call("NaN"), "line 1, message 2", "JSON can't hold"),
    "a key twice among many": (
        "a.jsonl",
        "{" + ",".join(f'"k{i}": 1' for i in range(30_000)) + ', "k29999": 1}',
        "line 1",
        "'k29999' stands twice",
    ),
    "null bytes": ("a.jsonl", b"\0" * 10**6, "line 1", "not valid JSON"),
    "line of 50 MB": ("a.jsonl", b"[" + b'"a",' * 12_000_000, "line 1", "not valid JSON"),
    "byte order mark twice": ("a.jsonl", "\ufeff\ufeff{}".encode(), "line 1", "not valid JSON"),
    "pickle": ("a.jsonl", pickle.dumps(Act("acted")), "not UTF-8"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08" + bytes(50), "not UTF-8"),
    "half a character as a key": ("a.jsonl", '{"\\ud800": 1}', "line 1", "isn't recognised"),
    "a column 20,000 times": ("a.csv", "a," * 20_000 + "\n", "two columns", "`a`"),
    "quotation without an end": ("a.csv", 'instruction,response\n"' + "a" * 5 * 10**6, "CSV"),
    "footer larger than the file": (
        "a.parquet",
        b"PAR1" + bytes(99) + struct.pack("<I", 2**31 - 1) + b"PAR1",
        "damaged",
    ),
    "footer of noise": ("a.parquet", b"PAR1" + b"\x15" * 99 + b"\x63\0\0\0PAR1", "damaged"),
    "zip": ("a.parquet", b"PK\x03\x04" + bytes(99), "damaged"),
    "text that is none": ("a.parquet", parquet(instruction=BROKEN, response=["b"]), "damaged"),
    "zstd bomb": (
        "a.parquet",
        parquet(instruction=["a" * 80_000_000], response=["b"]),
        "far more than it holds",
        "80,0",
    ),
}


@pytest.mark.parametrize("case", DATA.values(), ids=DATA)
def test_data(case, tmp_path, unharmed, refused):
    name, content, *parts = case
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    unharmed()
    with refused(DataError, name, *parts):
        load_and_prepare_data(str(path), DataSettings(split=[1, 0, 0]))


NAMES = {
    "long": "a" * 300,
    "long, with an owner": "owner/" + "a" * 300,
    "null byte": "a\0b",
    "null byte in a path": "a\0b/c/d",
    "device": "/dev/zero",
    "parent": "..",
    "empty": "",
    "address": "file:///etc/passwd",
    "half a character": "a\ud800",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names(name, tmp_path, unharmed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unharmed()
    with pytest.raises(DataError):
        load_and_prepare_data(name)
    with pytest.raises(ModelError):
        load_config(name)
    folder = adapter_name(name)
    assert (tmp_path / folder).resolve().parent == tmp_path.resolve()
    assert folder.startswith("my_custom_llm_") and "\0" not in folder


@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "a" * 300, "/dev/null/a"])
def test_output_folder(name, tmp_path, unharmed, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unharmed()
    with refused(ConfigError, "`output_dir` can't be written to", name[:1]), only_run(name):
        raise AssertionError


@pytest.fixture
def folder(tmp_path):
    "A copy of the built-in model, to be spoilt."
    return shutil.copytree(builtin_path("model"), tmp_path / "model")


def tensors(header, body=bytes(64), length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def entry(shape=(16,), offsets=(0, 64), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WEIGHTS = {
    "header of 8 EiB": tensors(b"{}", length=2**63),
    "header larger than the file": tensors(b"{}", length=10**6),
    "header that is no JSON": tensors(b"{{{{"),
    "deep header": tensors(b'{"a":' * 50_000),
    "tensors that overlap": tensors({"a": entry([4], [0, 16]), "b": entry([4], [8, 24])}),
    "shape of a yottabyte": tensors({"a": entry([2**40, 2**40])}),
    "shape below zero": tensors({"a": entry([-16])}),
    "end before the start": tensors({"a": entry(offsets=[64, 0])}),
    "unknown type": tensors({"a": entry(dtype="X9")}),
    "pickle": pickle.dumps(Act("acted")) + bytes(99),
}


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(content, folder, unharmed, refused):
    (folder / "model.safetensors").write_bytes(content)
    unharmed()
    with refused(ModelError, str(folder), "damaged weights"):
        setup_model(str(folder), cfg=ModelSettings(quantization="none"))


def spoil(folder, file, content):
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))


def set_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def shards(name):
    "Weights in a pickle, which a list of safetensors files names."

    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "other.bin").write_bytes(pickle.dumps(Act(folder / "acted")))
        spoil(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": name}})

    return change


def only_bin(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Act(folder / "acted")))


MODELS = {
    "pickle named .bin": (only_bin, "no weights in the safetensors format", "may run code"),
    "pickle in the list of shards": (shards("other.bin"), "names one that is not", "'other.bin'"),
    "shard elsewhere": (shards("../a.safetensors"), "names one that is not", "'../a.safetensors'"),
    "shard of the system": (shards("/etc/passwd"), "names one that is not", "'/etc/passwd'"),
    "deep list of shards": (
        lambda folder: spoil(folder, "model.safetensors.index.json", "[" * 10**5),
        "can't be loaded",
    ),
    "deep config": (lambda folder: spoil(folder, "config.json", "[" * 10**5), "can't be loaded"),
    "vocabulary of 2 ** 60": (set_config(vocab_size=2**60), "can't be loaded", "Storage size"),
    "size below zero": (set_config(hidden_size=-1), "can't be loaded"),
    "no heads": (set_config(num_attention_heads=0), "can't be loaded"),
    "list for a type": (set_config(model_type=["llama"]), "can't be loaded"),
    "deep tokenizer": (
        lambda folder: spoil(folder, "tokenizer.json", "[" * 10**5),
        "can't be loaded",
    ),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_models(case, folder, unharmed, refused):
    change, *parts = case
    change(folder)
    unharmed()
    with refused(ModelError, str(folder), *parts):
        setup_model(str(folder), cfg=ModelSettings(quantization="none"))


LOOP, END = "{% for i in range(99999) %}", "{% endfor %}"
NEST = "{% set n = namespace(s=['ha']) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}" + END
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TEMPLATES = {
    "repetition": "{{ 'a' * 10 ** 11 }}",
    "repetition of a list": "{{ [1] * 10 ** 10 }}",
    "power": "{{ 2 ** (2 ** 40) }}",
    "product that grows": "{% set n = namespace(i=7) %}" + LOOP + "{% set n.i = n.i * n.i %}" + END,
    "loops in loops": LOOP * 3 + END * 3,
    "loops that take nothing": LOOP + "{% for j in range(99999) if false %}" + END * 2,
    "loop of loops": "{% for i in range(99) recursive %}{{ loop(range(99)) if loop.depth < 9 }}"
    "{% endfor %}",
    "macro that doubles": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(99) }}",
    "text that doubles": "{% set n = namespace(s='ha') %}"
    + LOOP
    + "{% set n.s = n.s + n.s %}"
    + END,
    "list of lists": NEST + "{{ n.s }}",
    "list of lists as JSON": NEST + "{{ n.s | tojson }}",
    "list of lists in a comparison": NEST + "{{ n.s == [[n.s]] }}{{ n.s | string | length }}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "padding by a filter": "{{ 'a' | center(10 ** 10) }}",
    "indent": "{{ messages | tojson(indent=10 ** 9) }}",
    "format": "{{ '%0999999999d' % 1 }}",
    "format with a star": "{{ '%*d' % (10 ** 9, 1) }}",
    "format with a nested width": "{{ '{:>{w}}'.format(1, w='999999999') }}",
    "join": "{{ range(99999) | map('string') | join('a' * 99999) }}",
    "sum of lists": "{{ range(99999) | batch(1) | sum(start=[]) }}",
    "fill": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "rounding": "{{ 1.5 | round(10 ** 8) }}",
    "much text": LOOP + "many words " * 999 + END,
    "long template": "a" * 200_000,
    "only for the prompt": TURNS
    + "{% if add_generation_prompt %}"
    + LOOP * 2
    + END * 2
    + "{% endif %}",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_path("model"))


TALK = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good morning."}]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_that_do_too_much(template, tokenizer, unharmed, refused, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with refused(SandboxError):
        encode_chat(TALK, tokenizer)
    with refused(SandboxError):
        prompt_text(tokenizer, TALK[:1])


FORBIDDEN = {
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "import": ("{% import '/etc/passwd' as x %}", "no loader"),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    "class in a format": ("{{ '{0.__class__.__mro__}'.format('a') }}", "unsafe"),
    "change of the messages": ("{{ messages.clear() }}", "unsafe"),
    "slow codec": ("{{ 'a'.encode('punycode') }}", "unsafe"),
    "no end of calls": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "parentheses": ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "recursion"),
    "30 loops": (LOOP * 30 + END * 30, "nested"),
    "number of 5,000 digits": ("{{ 10 ** 5000 }}", "digits"),
    "message without an end": ("{{ raise_exception('a' * 10 ** 6) }}", "aaaa"),
}


@pytest.mark.parametrize("case", FORBIDDEN.values(), ids=FORBIDDEN)
def test_templates_that_are_refused(case, tokenizer, unharmed, refused, monkeypatch):
    template, part = case
    monkeypatch.setattr(tokenizer, "chat_template", template)
    for show in (lambda: encode_chat(TALK, tokenizer), lambda: prompt_text(tokenizer, TALK[:1])):
        with refused(TemplateError, part):
            show()
    assert TALK[0]["content"] == "Hello."


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY"])
def test_tokens_of_the_environment_are_not_shown(name, monkeypatch):
    monkeypatch.setenv(name, "a-secret-of-my-own")
    error = LorabookError("It failed.", "GET https://user:a-secret-of-my-own@host", "Wait.")
    assert "a-secret-of-my-own" not in str(error) and "https://user:***@host" in str(error)
