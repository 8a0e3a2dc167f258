"""How long it takes from pressing enter to the first training step of `lorabook run`.

    python benchmarks/start.py        writes results/start.json

The built-in model and data, with an empty cache. The peer is a bare import of the libraries that
every such training needs, in a process of its own; they take turns.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, median, save

IMPORTS = "import torch, datasets, bitsandbytes; from peft import get_peft_model, LoraConfig; "
IMPORTS += "from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer"
MARKS = {"imports": b"[1/6]", "prepared": b"[4/6]", "first_step": b" 1/100 "}


def lorabook():
    """Seconds until each of the marks is printed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [Path(sys.executable).with_name("lorabook"), "run", f"output_dir={folder}/run"]
        env = os.environ | {"HF_DATASETS_CACHE": folder}
        seconds, text, start = {}, b"", time.perf_counter()
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with subprocess.Popen(command, env=env, **pipes) as process:
            while len(seconds) < len(MARKS):
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    raise SystemExit(f"It ended before its first step:\n{text.decode()}")
                text += part
                now = time.perf_counter() - start
                seconds |= {k: now for k, v in MARKS.items() if v in text and k not in seconds}
            process.kill()
    return seconds


def imports():
    """Seconds of the libraries alone."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, stderr=subprocess.DEVNULL)
    return {"imports": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    peers = {"libraries alone": imports, "lorabook run": lorabook}
    runs = {peer: [] for peer in peers}
    for measure in peers.values():
        measure()  # once, so that the files are in memory
    for _ in range(args.repeats):
        for peer, measure in peers.items():
            runs[peer].append(measure())
            print(peer, {k: round(v, 1) for k, v in runs[peer][-1].items()}, flush=True)
    medians = {peer: {key: median(of, key) for key in of[0]} for peer, of in runs.items()}
    times = medians["lorabook run"]["first_step"] / medians["libraries alone"]["imports"]
    result = {
        "command": "python benchmarks/start.py",
        "machine": machine("torch", "transformers", "peft", "datasets", "bitsandbytes"),
        "repeats": args.repeats,
        "medians": medians,
        "times_the_imports": times,
        "runs": runs,
    }
    save("start", result)
    print(medians, f"{times:.2f} times the imports")


if __name__ == "__main__":
    main()
