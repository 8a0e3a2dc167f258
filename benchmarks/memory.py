"""The memory plan beside what a run really takes.

    python benchmarks/memory.py --device cuda     writes results/memory_cuda.json
    python benchmarks/memory.py --device cpu      writes results/memory_cpu.json

Every case is a training run of a few steps by the trainer, with an evaluation, in a process of its
own, on a model of the true shape with random weights, and on rows of the full length. On a GPU the
measured peak is `torch.cuda.max_memory_allocated` after the model is loaded. On a CPU (Linux) it is
the growth of the process's own memory (RssAnon, read every 2 ms) over what it had after its imports
and a first small run. Pages of the weights' file, which stay mapped, are not the process's own: the
weights are copied out of it first, so that all of them are counted, and once. The C library is told
to give memory back (MALLOC_MMAP_THRESHOLD_), or its leftovers would be counted.
"""

import argparse
import gc
import json
import os
import re
import tempfile
import threading
from pathlib import Path

from common import machine, run_peer, save

SHAPES = {  # as published
    "Qwen2.5-0.5B": dict(
        model_type="qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
    "Llama-3.1-8B": dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "Phi-4-mini": dict(
        model_type="phi3",
        vocab_size=200064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
        pad_token_id=0,
    ),
    "Qwen2.5-32B": dict(
        model_type="qwen2",
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
    "60M": dict(
        model_type="llama",
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "160M": dict(
        model_type="qwen2",
        vocab_size=50304,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
    ),
    "400M": dict(
        model_type="llama",
        vocab_size=50304,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
}
CASES = {
    "cuda": [
        (shape, quantization, checkpointing, packing)
        for shape in ("Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.1-8B")
        for quantization in ("none", "nf4")
        for checkpointing in (True, False)
        for packing in (False, True)
    ],
    "cpu": [
        (shape, quantization, checkpointing, packing)
        for shape in ("60M", "160M", "400M")
        for quantization, checkpointing, packing in (
            ("none", False, False),
            ("none", True, False),
            ("none", False, True),
            ("nf4", False, False),
        )
    ],
}
ROWS = {"cuda": (4, 1024), "cpu": (2, 256)}  # in a micro-batch, tokens


def run(model, tokenizer, cfg, packing, folder):
    """A few steps by the trainer, with an evaluation, on rows of the full length."""
    import torch
    from datasets import Dataset

    from lorabook import create_trainer

    length, rows = cfg.model.max_length, []
    for i in range(32):  # not packed: of different lengths, so that the mask is needed
        ids = torch.randint(10, 1000, [length - i % 2 * (not packing)]).tolist()
        rows.append({"input_ids": ids, "labels": ids, "length": len(ids)})
        if packing:
            rows[-1]["position_ids"] = [*range(length // 2)] * 2
    data = Dataset.from_list(rows)
    trainer = create_trainer(model, tokenizer, data, data.select(range(8)), folder, cfg.training)
    trainer.train()


def saved(shape, device, shapes):
    """A folder with a model of this shape, random weights and a tokenizer; made once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lorabook.config import builtin_path

    folder = Path(shapes) / f"{shape}-{device}"
    if (folder / "tokenizer_config.json").exists():
        return str(folder)
    sizes = dict(SHAPES[shape])
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin_path("model")).save_pretrained(folder)
    return str(folder)


def own_memory():
    """Bytes of this process that are no pages of a file."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


class Peak:
    """The most memory of its own that the process had inside the block, in bytes."""

    def __enter__(self):
        self.bytes, self.done = own_memory(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, own_memory())

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()


def measure(device, case, shapes):
    """One case, in this process: planned and measured bytes."""
    import torch

    from lorabook.config import ModelSettings, RunConfig
    from lorabook.model.adapter import setup_lora
    from lorabook.model.load import setup_model
    from lorabook.plan import plan_memory

    shape, quantization, checkpointing, packing = case
    rows, length = ROWS[device]
    cfg = RunConfig().override(
        f"model.name={saved(shape, device, shapes)}",
        f"model.quantization={quantization}",
        f"model.max_length={length}",
        f"data.packing={packing}".lower(),
        f"training.batch_size={rows}",
        "training.gradient_accumulation_steps=2",
        f"training.gradient_checkpointing={checkpointing}".lower(),
        "training.max_steps=2",
        "training.logging_steps=1",
        "training.save_strategy='no'",
        "training.load_best_model_at_end=false",
        "training.early_stopping_patience=null",
    )
    plan = plan_memory(cfg)
    with tempfile.TemporaryDirectory() as folder:
        if device == "cpu":  # what the first run of a process takes once
            small, tokenizer = setup_model(cfg=ModelSettings(quantization=quantization))
            tiny = cfg.override("model.max_length=32")
            run(setup_lora(small, cfg.lora), tokenizer, tiny, False, folder)
            del small
            gc.collect()
            before = own_memory()
        model, tokenizer = setup_model(cfg.model.name, cfg.seed, cfg.model)
        model = setup_lora(model, cfg.lora)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run(model, tokenizer, cfg, packing, folder)
            measured = torch.cuda.max_memory_allocated()
        else:
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.data = tensor.data.clone()
            gc.collect()
            with Peak() as peak:
                run(model, tokenizer, cfg, packing, folder)
            measured = peak.bytes - before
    return {
        "case": case,
        "planned": plan.peak_bytes,
        "measured": measured,
        "error": plan.peak_bytes / measured - 1,
        "components": plan.components,
        "phase": plan.phase,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=CASES, required=True)
    parser.add_argument("--peer", help="the number of a case, to be measured here; prints JSON")
    parser.add_argument("--shapes", help="a folder for the models; None: a temporary one")
    args = parser.parse_args()
    if args.peer is not None:
        return print(
            json.dumps(measure(args.device, CASES[args.device][int(args.peer)], args.shapes))
        )
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for number, case in enumerate(CASES[args.device]):
            options = ("--device", args.device, "--shapes", args.shapes or folder)
            runs.append(run_peer(__file__, str(number), *options))
            last = runs[-1]
            sizes = f"{last['planned'] / 1e9:.3f} GB planned, {last['measured'] / 1e9:.3f} measured"
            print(f"{str(case):<42}{sizes} {last['error']:+7.1%}", flush=True)
    errors = [abs(run["error"]) for run in runs]
    result = {
        "command": f"python benchmarks/memory.py --device {args.device}",
        "machine": machine("torch", "transformers", "peft", "bitsandbytes", "accelerate"),
        "largest_error": max(errors),
        "mean_error": sum(errors) / len(errors),
        "runs": runs,
    }
    save(f"memory_{args.device}", result)
    print(f"largest error {max(errors):.1%}, mean {result['mean_error']:.1%}")


if __name__ == "__main__":
    main()
