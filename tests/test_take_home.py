"""Adapters that leave the run: reloaded, merged in little memory, sent; and what may go wrong."""

import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorabook.config import LoraSettings, ModelSettings, RunConfig
from lorabook.errors import ModelError
from lorabook.export.merge import merge_adapter
from lorabook.export.merging import MergePlan
from lorabook.export.push import push_adapter
from lorabook.export.save import load_adapter, save_model
from lorabook.model.adapter import setup_lora
from lorabook.model.load import setup_model
from lorabook.testing import save_tiny_model

EXACT = ModelSettings(quantization="none", dtype="float32")
IDS = torch.arange(24)[None]
FAMILIES = {  # that are built in different ways -> fields of their configs
    "gemma2": {},  # embedding and head are one, and the embedding is scaled
    "phi3": {},  # fused layers
    "gpt_neox": {},  # biases
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_inner=64),  # its matrices are transposed
    "mixtral": dict(num_local_experts=2),  # its files call the experts otherwise
}


def adapted(name, output_dir, **options):
    "An adapter that does something, in memory and in a folder."
    model, tokenizer = setup_model(name, cfg=EXACT)
    model = setup_lora(model, LoraSettings(r=4, **options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    cfg = RunConfig(model=ModelSettings(name=name, quantization="none", dtype="float32"))
    return model, save_model(model, tokenizer, output_dir, name, cfg)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_reloaded_and_merged(family, tmp_path):
    name = save_tiny_model(tmp_path / "base", family, **FAMILIES[family])
    if family == "gpt2":  # as the hub has it, without the prefix of the model
        weights = load_file(tmp_path / "base/model.safetensors")
        weights = {key.removeprefix("transformer."): value for key, value in weights.items()}
        save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    targets = ["q_proj", "o_proj"] if family == "mixtral" else "all-linear"
    model, folder = adapted(name, tmp_path, target_modules=targets)
    again, _ = load_adapter(folder)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
    merge_adapter(folder, tmp_path / "merged", "float32", max_shard_size="20KB", check=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), logits(merged), atol=1e-2)


def test_two_of_one_name(tmp_path):
    name = save_tiny_model(tmp_path / "base")
    runs = [adapted(name, tmp_path / run) for run in ("one", "two")]
    both, _ = load_adapter(*(folder for _, folder in runs))
    keys = ["one_my_custom_llm_base", "two_my_custom_llm_base"]
    assert list(both.peft_config) == keys and both.active_adapter == keys[0]
    for key, (model, _) in zip(keys, runs):
        both.set_adapter(key)
        torch.testing.assert_close(logits(both), logits(model), atol=1e-5, rtol=0)


MEASURED = """
import sys
from pathlib import Path
from lorabook.export.merge import merge_adapter
import peft, transformers.models.llama.modeling_llama
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
merge_adapter(sys.argv[4], sys.argv[2] + "-tiny", check=False)  # loads the libraries
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = memory("VmRSS")
merge_adapter(sys.argv[1], sys.argv[2], max_shard_size=sys.argv[3], check=False)
print(memory("VmHWM") - before)
"""


def merged_in(tmp_path, fresh, shard, **config):
    "Bytes that merging takes at most, and those of the model."
    _, tiny = adapted(save_tiny_model(tmp_path / "tiny"), tmp_path)
    name = save_tiny_model(tmp_path / "base", dtype="bfloat16", head_dim=64, **config)
    model, tokenizer = setup_model(name, cfg=ModelSettings(quantization="none", dtype="bfloat16"))
    folder = save_model(setup_lora(model), tokenizer, tmp_path, name)
    del model
    result = fresh(MEASURED, str(folder), str(tmp_path / "merged"), shard, str(tiny))
    assert result.returncode == 0, result.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    return int(result.stdout.splitlines()[-1]), size


@pytest.mark.parametrize(
    "heads, layers, shard, least",  # MB of a shard, and of the model
    [(16, 10, 200, 300), pytest.param(32, 20, 500, 2400, marks=pytest.mark.slow)],
)
def test_memory_of_a_merge(heads, layers, shard, least, tmp_path, fresh):
    shapes = dict(hidden_size=64 * heads, intermediate_size=256 * heads, num_hidden_layers=layers)
    counts = dict(num_attention_heads=heads, num_key_value_heads=8)
    peak, size = merged_in(tmp_path, fresh, f"{shard}MB", **shapes, **counts)
    assert size > least * 1e6
    assert peak < 2 * shard * 1e6, f"{peak / 1e6:.0f} MB"


def merge_and_die(folder, target):
    "Merge, and be killed when there are some files."
    stream = MergePlan.stream

    def some(self, dtype):
        yield from itertools.islice(stream(self, dtype), 9)
        os.kill(os.getpid(), signal.SIGKILL)

    MergePlan.stream = some
    merge_adapter(folder, target, max_shard_size="20KB", check=False)


def test_killed_while_merging(tmp_path):
    name = save_tiny_model(tmp_path / "base")
    _, folder = adapted(name, tmp_path / "run")
    target = tmp_path / "models" / "merged"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=merge_and_die, args=(folder, target))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = target.parent.iterdir()
    assert left.name == ".saving-merged" and len(list(left.iterdir())) > 1
    merge_adapter(folder, target, check=False)
    assert list(target.parent.iterdir()) == [target]


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("")
from transformers import LlamaConfig
class Config(LlamaConfig): pass
"""


@pytest.mark.parametrize("work", [load_adapter, merge_adapter])
def test_code_of_a_stranger_is_not_run(work, tmp_path, monkeypatch):
    "Whatever its run.yaml says: the one who loads it has to say so."
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    name = save_tiny_model(tmp_path / "base")
    _, folder = adapted(name, tmp_path)
    config = json.loads(Path(name, "config.json").read_text())
    strange = dict(model_type="strange", auto_map={"AutoConfig": "code.Config"})
    Path(name, "config.json").write_text(json.dumps(config | strange))
    Path(name, "code.py").write_text(CODE)
    cfg = RunConfig.from_yaml(folder / "run.yaml")
    cfg.override("model.trust_remote_code=true").to_yaml(folder / "run.yaml")
    with pytest.raises(ModelError, match="needs Python code of its own"):
        work(folder, *[tmp_path / "merged"] * (work is merge_adapter))
    assert not list(tmp_path.rglob("ran")) and not (tmp_path / "merged").exists()


def test_a_merged_model_is_sent_without_secrets(tmp_path, monkeypatch, refused):
    name = save_tiny_model(tmp_path / "base")
    _, folder = adapted(name, tmp_path)
    merge_adapter(folder, tmp_path / "merged", max_shard_size="20KB", check=False)
    upload = push_adapter(tmp_path / "merged", "me/model")
    assert not upload.left_out and sum(name.endswith(".safetensors") for name in upload.files) > 2
    (tmp_path / "merged/weights.safetensors").symlink_to("/etc/passwd")
    assert push_adapter(tmp_path / "merged", "me/model").left_out.keys() == {"weights.safetensors"}
    monkeypatch.setenv("HF_TOKEN", "hf_thisisnotatokenofanybody")
    weights = load_file(folder / "adapter_model.safetensors")
    told = {"format": "pt", "by": "hf_thisisnotatokenofanybody"}
    save_file(weights, folder / "adapter_model.safetensors", told)
    with refused(ModelError, "adapter_model.safetensors") as caught:
        push_adapter(folder, "me/adapter", dry_run=False)
    assert "thisisnot" not in str(caught)
