"""Where the time of a training goes, beside the arithmetic limit.

    python benchmarks/limits.py --workload cpu             writes results/limits_cpu.json
    python benchmarks/limits.py --workload Qwen2.5-0.5B    needs a GPU; as in train.py

The training is that of train.py, by lorabook. The limit is the time that its matrix products and
its attention would take at the rate of the fastest of a few large products, measured here in the
same number format. Operations are counted by torch and timed by its profiler after a first step; on
a GPU the time is that of the kernels, and what is left of the wall clock is idle.
"""

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict

from common import machine, run_peer, save
from train import WORKLOADS, lorabook, model_of, rows_of

KINDS = {  # part of an operation's name -> what it is; the first that matches counts
    "attention": "attention",
    "attn": "attention",
    "4bit": "unpacking 4-bit weights",
    "blockwise": "unpacking 4-bit weights",
    "addmm": "matrix products",
    "mm": "matrix products",
    "softmax": "loss",
    "exp_": "loss",
    "gather": "loss",
    "scatter": "loss",
    "adam": "optimizer",
    "foreach": "optimizer",
    "norm": "optimizer",
    "copy": "copies",
    "cat": "copies",
    "clone": "copies",
    "dataloader": "data",
}


def kind_of(name):
    """What an operation is, for the table."""
    return next((kind for part, kind in KINDS.items() if part in name.lower()), "elementwise")


def count_4bit(x, packed, shape, *args, out_shape=None, **kwargs):
    """Operations of a product with a 4-bit weight."""
    return 2 * math.prod(x) * shape[0]


def fastest_product(dtype, device):
    """Operations per second of the fastest of some square products."""
    import torch

    best = 0.0
    for size in (1024, 2048, 4096, 8192) if device == "cuda" else (512, 1024, 2048):
        a = torch.randn(size, size, dtype=dtype, device=device)
        for _ in range(5):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def measure(workload):
    """One training under the profiler and one under the counter, in this process."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import TrainerCallback

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    work, rows = WORKLOADS[workload], rows_of(workload)
    quantized = on_gpu and workload == "Llama-3.1-8B"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    formulas = {}
    if quantized:
        formulas[torch.ops.bitsandbytes.gemm_4bit.default] = count_4bit

    class Watch(TrainerCallback):
        def __init__(self, watched):
            self.watched, self.seconds = watched, 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.watched.__enter__()
                self.start = time.perf_counter()

        def on_train_end(self, args, state, control, **kwargs):
            if on_gpu:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.start
            self.watched.__exit__(None, None, None)

    def train(watched):
        watch = Watch(watched)
        with tempfile.TemporaryDirectory() as folder:
            trainer = lorabook(*model_of(workload, dtype, quantized), rows, work, folder)
            trainer.add_callback(watch)
            trainer.train()
        return watch

    counted = train(FlopCounterMode(display=False, custom_mapping=formulas))
    profiled = train(profile(activities=activities))
    shares = defaultdict(float)
    for event in profiled.watched.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        shares[kind_of(event.key)] += own / 1e6
    rate = fastest_product(dtype, device)
    flops = counted.watched.get_total_flops()
    return {
        "seconds": profiled.seconds,
        "operations": flops,
        "operations_per_second": rate,
        "limit_seconds": flops / rate,
        "share_of_limit": flops / rate / profiled.seconds,
        "seconds_by_kind": dict(sorted(shares.items(), key=lambda item: -item[1])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--peer", help="measured here; prints JSON")
    args = parser.parse_args()
    if args.peer:
        return print(json.dumps(measure(args.workload)))
    result = run_peer(__file__, "lorabook", "--workload", args.workload)
    versions = machine("torch", "transformers", "peft", "accelerate")
    command = f"python benchmarks/limits.py --workload {args.workload}"
    save(f"limits_{args.workload}", {"command": command, "machine": versions, **result})
    for kind, seconds in result["seconds_by_kind"].items():
        print(f"{kind:<28}{seconds:8.2f} s {seconds / result['seconds']:6.0%}")
    print(f"{'all':<28}{result['seconds']:8.2f} s")
    print(f"the arithmetic alone        {result['limit_seconds']:8.2f} s", end=" ")
    print(f"{result['share_of_limit']:6.0%}")


if __name__ == "__main__":
    main()
