"""How long planning takes, and how much memory, for models of known shapes, on one core.

    OMP_NUM_THREADS=1 python benchmarks/plan.py     writes results/plan.json

Each is measured in a process of its own, after the imports: `plan_memory` of 4 x 2,048 tokens on an
A100, with NF4 weights and recomputing; then the table of all cards.
"""

import argparse
import json
import time

from common import machine, run_peer, save
from memory import SHAPES

MODELS = ("Qwen2.5-0.5B", "Llama-3.2-1B", "Phi-4-mini", "Llama-3.1-8B", "Qwen2.5-32B")


def measure(name):
    """Seconds and bytes of planning one model, in this process."""
    from transformers import AutoConfig

    from lorabook.config import RunConfig
    from lorabook.devices import device_table
    from lorabook.hardware import DEVICES
    from lorabook.memory import MemoryTimeline
    from lorabook.plan import plan_memory

    sizes = dict(SHAPES[name])
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    settings = (f"model.name={name}", "model.max_length=2048", "model.quantization=nf4")
    cfg = RunConfig().override(*settings, "training.gradient_checkpointing=true")
    timeline = MemoryTimeline(interval=0.02)
    with timeline:
        timeline.mark("imports")
        start = time.perf_counter()
        plan = plan_memory(cfg, "A100 80", config)
        planned = time.perf_counter()
        timeline.mark("plan")
        table = device_table(cfg, config, [*DEVICES])
        tabled = time.perf_counter()
        timeline.mark("table")
    imports, *later = timeline.rows
    return {
        "model": name,
        "plan_seconds": planned - start,
        "table_seconds": tabled - planned,
        "grown_bytes": max(row["peak"] for row in later) - imports["allocated"],
        "peak_bytes": plan.peak_bytes,
        "components": plan.components,
        "table": str(table),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=MODELS, help="one to be measured here; prints JSON")
    args = parser.parse_args()
    if args.peer:
        return print(json.dumps(measure(args.peer)))
    runs = []
    for name in MODELS:
        runs.append(run_peer(__file__, name))
        last = runs[-1]
        print(f"{last['table']}\n{name}: {last['plan_seconds']:.1f} s, the table", end=" ")
        print(f"{last['table_seconds']:.1f} s, {last['grown_bytes'] / 1e6:.0f} MB\n", flush=True)
    libraries = machine("torch", "transformers", "peft")
    save("plan", {"command": "python benchmarks/plan.py", "machine": libraries, "runs": runs})


if __name__ == "__main__":
    main()
