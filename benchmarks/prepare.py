"""From conversations to trained tokens: rows per second and memory, beside TRL's preparation.

    python benchmarks/prepare.py --rows 20000 --repeats 5     writes results/prepare.json
    python benchmarks/prepare.py --rows 100000 --repeats 1    writes results/prepare_100000.json

Both sides get the same rows, the same tokenizer and template (with generation marks, which TRL
needs and lorabook does not), and end with `input_ids` and labels of the assistant's tokens alone.
TRL is measured with one process and with two, since either can be its best.
"""

import argparse
import json
import random
import resource
import time

from common import machine, median, run_peer, save

PEERS = ("lorabook", "trl", "trl, 2 processes")
WORDS = "amber basil cedar delta ember fjord grove heron inlet jetty kelp lotus maple olive".split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversations(rows):
    """Conversations of three messages, each different, about 120 tokens."""
    rng = random.Random(0)
    say = lambda low, high: " ".join(rng.choices(WORDS, k=rng.randint(low, high))) + "."
    for _ in range(rows):
        parts = zip(("system", "user", "assistant"), ((4, 8), (10, 30), (10, 50)))
        yield {"messages": [{"role": role, "content": say(*size)} for role, size in parts]}


def prepare_lorabook(data, tokenizer):
    """Seconds that `prepare_datasets` takes, and the trained tokens."""
    from datasets import DatasetDict

    from lorabook import prepare_datasets

    start = time.perf_counter()
    rows = prepare_datasets(DatasetDict(train=data), tokenizer, max_length=512)["train"]
    return time.perf_counter() - start, rows


def prepare_trl(data, tokenizer, processes):
    """Seconds that TRL's `SFTTrainer` takes for its dataset, and its rows."""
    import tempfile

    from trl import SFTConfig, SFTTrainer

    from lorabook.testing import tiny_model

    taken = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            start = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            taken.append(time.perf_counter() - start)
            return prepared

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            max_length=512,
            dataset_num_proc=processes,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        model = tiny_model(vocab_size=len(tokenizer) + 64)
        trainer = Timed(model, config, train_dataset=data, processing_class=tokenizer)
    return sum(taken), trainer.train_dataset


def measure(peer, rows):
    """One peer, in this process."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from lorabook.config import builtin_path

    tokenizer = AutoTokenizer.from_pretrained(builtin_path("model"))
    tokenizer.chat_template = TEMPLATE
    data = Dataset.from_generator(conversations, gen_kwargs={"rows": rows})
    if peer == "lorabook":
        seconds, prepared = prepare_lorabook(data, tokenizer)
    else:
        seconds, prepared = prepare_trl(data, tokenizer, 2 if "2" in peer else None)
    own, children = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    trained = sum(
        sum(label != -100 for row in batch["labels"] for label in row)
        for batch in prepared.select_columns(["labels"]).iter(1000)
    )
    return {
        "seconds": seconds,
        "rows_per_s": rows / seconds,
        "rows": len(prepared),
        "trained_tokens": trained,
        "peak_gb": (own + children) * 1024 / 1e9,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", choices=PEERS, help="measure this one here, and print JSON")
    args = parser.parse_args()
    if args.peer:
        return print(json.dumps(measure(args.peer, args.rows)))
    runs = {peer: [] for peer in PEERS}
    for repeat in range(args.repeats):
        for peer in PEERS:
            runs[peer].append(run_peer(__file__, peer, "--rows", args.rows))
            last = runs[peer][-1]
            print(f"{repeat + 1}: {peer:<18}{last['rows_per_s']:8.0f} rows/s", flush=True)
    if len({(run["rows"], run["trained_tokens"]) for peer in PEERS for run in runs[peer]}) != 1:
        raise SystemExit("The peers did not prepare the same tokens.")
    speed = {peer: median(runs[peer], "rows_per_s") for peer in PEERS}
    best = max(value for peer, value in speed.items() if peer != "lorabook")
    result = {
        "command": f"python benchmarks/prepare.py --rows {args.rows} --repeats {args.repeats}",
        "machine": machine("torch", "transformers", "datasets", "tokenizers", "trl"),
        "median_rows_per_s": speed,
        "median_peak_gb": {peer: median(runs[peer], "peak_gb") for peer in PEERS},
        "lorabook_over_best_peer": speed["lorabook"] / best,
        "runs": runs,
    }
    save("prepare" if args.repeats > 1 else f"prepare_{args.rows}", result)
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))


if __name__ == "__main__":
    main()
