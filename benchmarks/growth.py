"""How the cost of a step grows with the context and the vocabulary, and that of the data with rows.

    python benchmarks/growth.py         writes results/growth_cpu.json and growth_cpu.png (or _cuda)

A step trains one row of 512 to 8,192 tokens, or four rows of 256 tokens with a vocabulary of 8,000
to 256,000, by lorabook and by TRL without recomputing; the shape is that of `train.py`. The time is
the median of the steps after the first, the memory the peak above what the process had before the
model was made. The data are 1,000 to 100,000 conversations in a JSONL file: read, split, tokenized
and packed. Every point is a process of its own; an exponent is the slope between the last two.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

from common import RESULTS, machine, run_peer, save
from train import SHAPES, TRL, lorabook, trl

AXES = {
    "context": [512, 1024, 2048, 4096, 8192],
    "vocabulary": [8_000, 32_000, 64_000, 128_000, 256_000],
    "rows": [1_000, 10_000, 100_000],
}
PEERS = {"context": ["lorabook", "trl"], "vocabulary": ["lorabook", "trl"], "rows": ["lorabook"]}


def step(peer, axis, value):
    """Seconds and bytes of a training step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from lorabook.config import builtin_path
    from lorabook.memory import MemoryTimeline

    class Clock(TrainerCallback):
        times = []

        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    length, count = (value, 1) if axis == "context" else (256, 4)
    sizes = SHAPES["cpu"] | dict(max_position_embeddings=8192)
    sizes |= dict(vocab_size=value) if axis == "vocabulary" else {}
    work, prompt = dict(max_length=length, micro=count, steps=1, passes=1), 6 * length // 10
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, [5 * count, length], generator=random).tolist()
    labels = [[-100] * prompt + row[prompt:] for row in ids]
    rows = [dict(input_ids=i, labels=o, length=length) for i, o in zip(ids, labels)]
    timeline = MemoryTimeline(interval=0.01)
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder, timeline:
        timeline.mark("start")
        config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        with torch.device("cuda" if on_gpu else "cpu"):
            model = AutoModelForCausalLM.from_config(config)
        tokenizer = AutoTokenizer.from_pretrained(builtin_path("model"))
        kept = TRL["trl, kept activations"]
        make, options = (lorabook, {}) if peer == "lorabook" else (trl, kept)
        trainer = make(model, tokenizer, rows, work, folder, **options)
        trainer.add_callback(Clock())
        timeline.mark("made")
        trainer.train()
        timeline.mark("trained")
    before = 0 if on_gpu else timeline.rows[0]["allocated"]
    seconds = [b - a for a, b in zip(Clock.times, Clock.times[1:])]
    return statistics.median(seconds), timeline.rows[-1]["peak"] - before


def data(count):
    """Seconds and bytes of reading, splitting, tokenizing and packing so many conversations."""
    from datasets import DatasetDict

    from lorabook.builtin import make_records
    from lorabook.config import RunConfig
    from lorabook.data.batch import prepare_datasets
    from lorabook.data.pack import pack
    from lorabook.data.source import load_and_prepare_data
    from lorabook.memory import MemoryTimeline
    from lorabook.model.load import setup_tokenizer

    cfg, records = RunConfig(), make_records()
    timeline = MemoryTimeline(interval=0.01)
    with tempfile.TemporaryDirectory() as folder, timeline:
        path = Path(folder, "rows.jsonl")
        with path.open("w", encoding="utf-8") as file:
            for i in range(count):
                record = records[i % len(records)]
                changed = record | {"instruction": f"{record['instruction']} Note {i}."}
                file.write(json.dumps(changed) + "\n")
        timeline.mark("start")
        start = time.perf_counter()
        splits = load_and_prepare_data(str(path), cfg.data, cfg.seed)
        tokenizer = setup_tokenizer(cfg.model.name, cfg.model)
        rows = prepare_datasets(DatasetDict(train=splits["train"]), tokenizer, cfg.data, 512)
        pack(rows["train"], 512, "train")
        seconds = time.perf_counter() - start
        timeline.mark("prepared")
    return seconds, timeline.rows[-1]["peak"] - timeline.rows[0]["allocated"]


def slope(points, key):
    """The exponent between the last two points."""
    first, last = points[-2:]
    return math.log(last[key] / first[key]) / math.log(last["value"] / first["value"])


def draw(curves, path):
    """Time above, memory below, one column for each axis."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, panels = plt.subplots(2, len(AXES), figsize=(10, 5), layout="constrained")
    for column, axis in enumerate(AXES):
        for peer in PEERS[axis]:
            points = curves[axis][peer]
            for panel, key, scale in zip(panels[:, column], ("seconds", "bytes"), (1, 1e9)):
                values = [point[key] / scale for point in points]
                label = f"{peer}, exponent {slope(points, key):.2f}"
                panel.loglog([point["value"] for point in points], values, "o-", label=label)
        values = AXES[axis]
        for panel, unit in zip(panels[:, column], ("seconds", "GB")):
            panel.set(ylabel=unit)
            panel.set_xticks(values, [f"{v // 1000}k" if v >= 8000 else v for v in values])
            panel.minorticks_off()
            low, high = panel.get_ylim()
            panel.set_ylim(low / 1.5, high * 1.5)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.legend(frameon=False, fontsize=8)
            panel.spines[["top", "right"]].set_visible(False)
        what = {"context": "tokens in the row", "vocabulary": "vocabulary", "rows": "conversations"}
        panels[1, column].set(xlabel=what[axis])
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="one to be measured here; prints JSON")
    parser.add_argument("--axis", choices=AXES)
    parser.add_argument("--value", type=int)
    args = parser.parse_args()
    if args.peer:
        what = data(args.value) if args.axis == "rows" else step(args.peer, args.axis, args.value)
        return print(json.dumps(dict(value=args.value, seconds=what[0], bytes=what[1])))
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    curves = {axis: {peer: [] for peer in peers} for axis, peers in PEERS.items()}
    for axis, values in AXES.items():
        for value in values:
            for peer in PEERS[axis]:
                point = run_peer(__file__, peer, "--axis", axis, "--value", value)
                curves[axis][peer].append(point)
                figures = f"{point['seconds']:8.2f} s {point['bytes'] / 1e9:7.3f} GB"
                print(f"{axis:<11}{value:>8} {peer:<9}{figures}", flush=True)
    exponents = {
        axis: {
            peer: {key: slope(of, key) for key in ("seconds", "bytes")} for peer, of in c.items()
        }
        for axis, c in curves.items()
    }
    libraries = machine("torch", "transformers", "peft", "accelerate", "trl", "datasets")
    result = dict(command="python benchmarks/growth.py", machine=libraries)
    save(f"growth_{device}", result | dict(exponents=exponents, curves=curves))
    draw(curves, RESULTS / f"growth_{device}.png")


if __name__ == "__main__":
    main()
