"""Training: tokens per second, peak memory and loss, beside the recipe and TRL's `SFTTrainer`.

    python benchmarks/train.py --workload cpu --repeats 5        writes results/train_cpu.json, .png
    python benchmarks/train.py --workload builtin --repeats 5    writes results/train_builtin.json
    python benchmarks/train.py --workload Qwen2.5-0.5B           needs a GPU, and so do
    python benchmarks/train.py --workload Llama-3.2-1B           and Llama-3.1-8B

All peers train the same adapter on the same token ids, for as many conversations in an optimizer
step, in the same order of magnitude of steps: three passes over the rows on a CPU, so that the
first steps don't weigh much, and one on a GPU. Each is a process of its own, and they take turns.
Only the training is timed, from its first step to its last; a token is one of a conversation,
padding does not count. The memory is the peak above what the process had before the model was made:
of its own memory on a CPU, as torch counts on a GPU.

The recipe pads every row to `max_length`, trains on all tokens, and keeps nothing: it is given as
people copy it. TRL is measured as it comes, without recomputing, and packed without recomputing,
with labels of the answers alone; its best is what the ratios are taken from. Unsloth is measured if
it is installed, which takes a GPU.
"""

import argparse
import json
import random
import tempfile
import time
from importlib.util import find_spec

from common import RESULTS, machine, median, run_peer, save
from memory import SHAPES

SHAPES = SHAPES | {
    "cpu": dict(
        model_type="llama",
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
}
WORKLOADS = {  # conversations, their lengths, passes; micro-batch, and how many make a step
    "cpu": dict(rows=64, lengths=(60, 245), passes=3, max_length=512, micro=4, steps=2),
    "builtin": dict(rows=128, passes=3, max_length=512, micro=4, steps=8),
    "Qwen2.5-0.5B": dict(
        rows=256, lengths=(100, 2000), passes=1, max_length=2048, micro=4, steps=4
    ),
    "Llama-3.2-1B": dict(
        rows=256, lengths=(100, 2000), passes=1, max_length=2048, micro=4, steps=4
    ),
    "Llama-3.1-8B": dict(
        rows=128, lengths=(100, 2000), passes=1, max_length=2048, micro=2, steps=8
    ),
}
TRL = {
    "trl": {},
    "trl, kept activations": dict(gradient_checkpointing=False),
    "trl, kept, twice the rows": dict(gradient_checkpointing=False, times=2),
    "trl, packed, kept activations": dict(gradient_checkpointing=False, packing=True),
}
UNSLOTH = {"unsloth": {}, "unsloth, packed": dict(packing=True)}
PEERS = ["recipe", *TRL, *(UNSLOTH if find_spec("unsloth") else ()), "lorabook"]


def rows_of(workload):
    """Token ids and labels; the last 40 % of each conversation are trained."""
    work, rng = WORKLOADS[workload], random.Random(0)
    if workload == "builtin":
        from lorabook import load_and_prepare_data, prepare_datasets
        from lorabook.model.load import setup_tokenizer

        data = prepare_datasets(load_and_prepare_data(), setup_tokenizer())["train"]
        return data.select(range(work["rows"])).to_list()
    rows = []
    for _ in range(work["rows"]):
        ids = [rng.randrange(10, 1000) for _ in range(rng.randint(*work["lengths"]))]
        prompt = int(0.6 * len(ids))
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "length": len(ids)})
    return rows


def model_of(workload, dtype, quantized):
    """A model of the shape, with random weights; the built-in one as it is."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lorabook.config import builtin_path

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(builtin_path("model"))
    if workload == "builtin":
        path = builtin_path("model")
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), tokenizer
    sizes = dict(SHAPES[workload])
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantized:
        model = quantize(model, dtype)
    return model, tokenizer


def quantize(model, dtype):
    """NF4 with double quantization, by way of a saved folder as bitsandbytes wants it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, dtype=dtype, device_map={"": 0}
        )


def adapted(model):
    """The same adapter for all: r=16 on all linear layers, B not zero so that all of it moves."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def arguments(work, folder, **changes):
    """What all trainers are told."""
    import torch

    on_gpu = torch.cuda.is_available()
    values = dict(
        output_dir=folder,
        num_train_epochs=work["passes"],
        per_device_train_batch_size=work["micro"],
        gradient_accumulation_steps=work["steps"],
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        dataloader_pin_memory=on_gpu,
    )
    return values | changes


def recipe(model, tokenizer, rows, work, folder):
    """As it is copied: padded to the maximum, labels over everything, recomputed, full logits."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    pad = lambda ids, value: ids + [value] * (work["max_length"] - len(ids))
    data = [
        {
            "input_ids": pad(row["input_ids"], 0),
            "attention_mask": pad([1] * row["length"], 0),
            "labels": pad(row["input_ids"], 0),
        }
        for row in rows
    ]
    values = arguments(work, folder, remove_unused_columns=False)
    values |= dict(gradient_checkpointing=True)
    values |= dict(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adapted(model)
    model.enable_input_require_grads()
    model.config.use_cache = False
    return Trainer(
        model=model,
        args=TrainingArguments(**values),
        train_dataset=Dataset.from_list(data),
        data_collator=default_data_collator,
    )


def trl(model, tokenizer, rows, work, folder, **changes):
    """TRL's trainer."""
    return sft_trainer(adapted(model), tokenizer, rows, work, folder, **changes)


def unsloth(model, tokenizer, rows, work, folder, **changes):
    """Unsloth's model and adapter in TRL's trainer; it loads its model from a folder."""
    import torch
    from unsloth import FastLanguageModel

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    quantized = getattr(model, "is_quantized", False)
    del model
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=work["max_length"], dtype=torch.bfloat16, load_in_4bit=quantized
    )
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, target_modules=layers)
    return sft_trainer(model, tokenizer, rows, work, folder, **changes)


def sft_trainer(model, tokenizer, rows, work, folder, **changes):
    """Packed, a step holds about as many conversations as otherwise."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    more = changes.pop("times", 1)  # times the micro-batch, in as many times fewer parts
    work = work | dict(micro=work["micro"] * more, steps=work["steps"] // more)
    values = arguments(work, folder, max_length=work["max_length"]) | changes
    if changes.get("packing"):
        tokens = sum(row["length"] for row in rows) / len(rows) * work["micro"] * work["steps"]
        count = max(1, round(tokens / work["max_length"]))
        micro = max(n for n in range(1, work["micro"] + 1) if count % n == 0)
        values |= dict(per_device_train_batch_size=micro)
        values |= dict(gradient_accumulation_steps=count // micro)
    data = Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
    return SFTTrainer(
        model=model,
        args=SFTConfig(**values),
        train_dataset=data,
        processing_class=tokenizer,
    )


def lorabook(model, tokenizer, rows, work, folder):
    """What `run_training` does, with the size of a micro-batch left to `fit`."""
    from datasets import Dataset

    from lorabook import create_trainer, fit
    from lorabook.config import RunConfig

    held = work["micro"] * work["steps"]  # rows of an optimizer step; `auto` counts them in fours
    size, accumulated = ("auto", held // 4) if held % 4 == 0 else (held, 1)
    cfg = RunConfig().override(
        f"training.batch_size={size}",
        f"training.gradient_accumulation_steps={accumulated}",
        "training.max_steps=-1",
        f"training.num_train_epochs={work['passes']}",
        "training.learning_rate=1e-3",
        "training.lr_scheduler_type=constant",
        "training.logging_steps=1",
        "training.save_strategy='no'",
        "training.load_best_model_at_end=false",
        f"model.max_length={max(row['length'] for row in rows)}",
        f"model.quantization={'nf4' if getattr(model, 'is_quantized', False) else 'none'}",
    )
    cfg = fit(cfg, config=model.config).cfg
    data = Dataset.from_list(rows)
    return create_trainer(adapted(model), tokenizer, data, None, folder, cfg.training)


def measure(peer, workload):
    """One training, in this process: its time, peak memory and losses."""
    import torch

    from lorabook.memory import MemoryTimeline

    work, rows = WORKLOADS[workload], rows_of(workload)
    if peer in UNSLOTH:
        import unsloth as _  # noqa: F401  before transformers, as it asks for
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    make = globals()[peer.partition(",")[0]]
    timeline = MemoryTimeline(interval=0.01)
    with tempfile.TemporaryDirectory() as folder, timeline:
        timeline.mark("start")
        model, tokenizer = model_of(workload, dtype, on_gpu and workload == "Llama-3.1-8B")
        timeline.mark("model")
        options = (TRL | UNSLOTH).get(peer, {})
        trainer = make(model, tokenizer, rows, work, folder, **options)
        del model
        timeline.mark("prepared")
        start = time.perf_counter()
        trainer.train()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        timeline.mark("training")
    before = 0 if on_gpu else timeline.rows[0]["allocated"]
    tokens = work["passes"] * sum(row["length"] for row in rows)
    return {
        "peer": peer,
        "seconds": seconds,
        "tokens": tokens,
        "trained_tokens": work["passes"]
        * sum(label != -100 for row in rows for label in row["labels"]),
        "tokens_per_second": tokens / seconds,
        "peak_bytes": timeline.rows[-1]["peak"] - before,
        "steps": trainer.state.global_step,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }


def draw(table, path):
    """Tokens per second and peak memory of each peer, as bars."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 2.4), layout="constrained", sharey=True)
    colors = ["#0969da" if peer == "lorabook" else "#bbb" for peer in table]
    for panel, key, scale, title in (
        (panels[0], "tokens_per_second", 1, "tokens per second"),
        (panels[1], "peak_bytes", 1e9, "peak memory, GB"),
    ):
        values = [row[key] / scale for row in table.values()]
        shown = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
        panel.bar_label(panel.barh([*table], values, color=colors), shown, padding=3)
        panel.set(title=title, xlim=(0, 1.15 * max(values)), xticks=[])
        panel.spines[:].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--peer", help="one to be measured here; prints JSON")
    args = parser.parse_args()
    if args.peer is not None:
        return print(json.dumps(measure(args.peer, args.workload)))
    runs = {peer: [] for peer in args.peers}
    for _ in range(args.repeats):
        for peer in args.peers:
            runs[peer].append(run_peer(__file__, peer, "--workload", args.workload))
            last = runs[peer][-1]
            print(f"{peer:<32}{last['tokens_per_second']:8.0f} tokens/s", end="")
            print(f"{last['peak_bytes'] / 1e9:8.3f} GB {last['steps']:4} steps", flush=True)
    table = {
        peer: {key: median(of, key) for key in ("tokens_per_second", "peak_bytes", "seconds")}
        for peer, of in runs.items()
    }
    result = {
        "command": f"python benchmarks/train.py --workload {args.workload}",
        "machine": machine("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes"),
        "repeats": args.repeats,
        "medians": table,
        "runs": runs,
    }
    if "lorabook" in table:
        ours, best = table["lorabook"], [table[peer] for peer in TRL if peer in table]
        speed, memory = ours["tokens_per_second"], ours["peak_bytes"]
        if "recipe" in table:
            result["times_the_recipe"] = speed / table["recipe"]["tokens_per_second"]
        others = [table[peer]["tokens_per_second"] for peer in UNSLOTH if peer in table]
        if others:
            result["times_unsloth"] = speed / max(others)
        if best:
            fastest = max(best, key=lambda peer: peer["tokens_per_second"])
            result["times_trl"] = speed / fastest["tokens_per_second"]
            result["memory_of_fastest_trl"] = memory / fastest["peak_bytes"]
            result["memory_of_smallest_trl"] = memory / min(peer["peak_bytes"] for peer in best)
    if args.peers == PEERS:
        save(f"train_{args.workload}", result)
        draw(table, RESULTS / f"train_{args.workload}.png")
    for key in result:
        if key.startswith(("times_", "memory_of_")):
            print(f"{key}: {result[key]:.2f}")


if __name__ == "__main__":
    main()
