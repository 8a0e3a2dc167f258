"""What the benchmarks share: peers in processes of their own, interleaved, and results as JSON."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def run_peer(script, peer, *args):
    """Run `script --peer PEER ARGS` in a process with an empty cache; its last line is JSON."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, script, "--peer", peer, *map(str, args)]
        done = subprocess.run(command, env=env | {"TMPDIR": folder}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine(*libraries):
    """Where a result was measured: cores, and versions of the libraries."""
    versions = {name: metadata.version(name) for name in libraries}
    return {"cores": os.cpu_count(), "python": sys.version.split()[0], **versions}


def median(runs, key):
    """The median of a figure over runs."""
    return statistics.median(run[key] for run in runs)


def save(name, result):
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
