"""`fit` keeps its word: what it chooses stays under the limit, and trains the same."""

import json

import pytest

from lorabook.config import RunConfig
from lorabook.devices import fit
from lorabook.hardware import Hardware

SHAPE = dict(
    vocab_size=4000,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
WIDE = (
    "model.quantization=none",
    "model.max_length=128",
    "training.batch_size=auto",
    "training.gradient_accumulation_steps=4",
    "training.max_steps=3",
    "training.learning_rate=1e-2",
)
CHILD = """
import gc, json, sys, tempfile
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from lorabook import create_trainer, setup_lora
from lorabook.config import RunConfig, builtin_path
from lorabook.memory import MemoryTimeline

shape, settings = json.loads(sys.argv[1])
cfg = RunConfig().override(*settings)
tokenizer = AutoTokenizer.from_pretrained(builtin_path("model"))

def run(rows, shape, training):
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = setup_lora(LlamaForCausalLM(LlamaConfig(**shape)))
        for p in model.parameters():  # B is zero at the beginning, which would hide mistakes in A
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.02)
        trainer = create_trainer(model, tokenizer, Dataset.from_list(rows), None, folder, training)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

def rows(length):
    g = torch.Generator().manual_seed(1)
    sizes = [length - 8 * (i % 4) for i in range(48)]
    ids = [torch.randint(5, 25, [n], generator=g).tolist() for n in sizes]
    return [{"input_ids": x, "labels": x, "length": len(x)} for x in ids]

timeline = MemoryTimeline(interval=0.002)
run(rows(40), shape | dict(num_hidden_layers=1, vocab_size=1000), cfg.training)  # warms up
gc.collect()
with timeline:
    timeline.mark("start")
    losses = run(rows(cfg.model.max_length), shape, cfg.training)
    timeline.mark("run")
start, end = timeline.rows
print(json.dumps([end["peak"] - start["allocated"], losses]))
"""


def measured(cfg, fresh):
    "(growth of the process's own memory, losses) of a few steps with these settings."
    training = {k: v for k, v in cfg.to_dict()["training"].items() if v is not None}
    settings = [f"training.{key}={json.dumps(value)}" for key, value in training.items()]
    settings += [f"model.{key}={getattr(cfg.model, key)}" for key in ("max_length", "quantization")]
    settings += ["training.logging_steps=1", "training.save_steps=3"]
    trims = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = fresh(CHILD, json.dumps([SHAPE, settings]), **trims)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def config():
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPE)


def limit(size):
    "A CPU with so many bytes."
    return Hardware("cpu", "limited", 1, int(size))


@pytest.fixture(scope="module")
def plain(config, fresh):
    "(config, measured peak, losses) of the run without any limit."
    cfg = fit(RunConfig().override(*WIDE), limit(1e12), config).cfg
    assert (cfg.training.batch_size, cfg.training.gradient_checkpointing) == (8, False)
    return cfg, *measured(cfg, fresh)


@pytest.mark.parametrize("share", [0.4, pytest.param(0.75, marks=pytest.mark.slow)])
def test_what_fits_stays_under_the_limit_and_trains_the_same(config, plain, fresh, share):
    wide, peak, losses = plain
    size = share * peak
    found = fit(RunConfig().override(*WIDE), limit(size), config)
    training = found.cfg.training
    assert training.batch_size * training.gradient_accumulation_steps == 16
    assert found.cfg.to_dict() != wide.to_dict()
    used, same = measured(found.cfg, fresh)
    assert used < size < peak
    assert same == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.1  # the steps were no small ones
