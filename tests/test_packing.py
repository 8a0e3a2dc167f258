"""A packed row trains exactly as its conversations do one by one."""

import itertools
import re

import numpy as np
import pytest
import torch
from conftest import stir
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from lorabook.config import LoraSettings, ModelSettings, RunConfig, TrainingSettings
from lorabook.data.batch import prepare_datasets
from lorabook.data.pack import PackCollator, best_fit, check_packing, pack
from lorabook.errors import ConfigError, DataError
from lorabook.infer.heldout import held_out_loss
from lorabook.model.adapter import setup_lora
from lorabook.model.attention import use_varlen
from lorabook.model.load import setup_model
from lorabook.run import run_training
from lorabook.testing import FAMILIES, sample_chats, tiny_model
from lorabook.train.trainer import create_trainer

CHATS = [chat for turns in (1, 2, 3) for chat in sample_chats(4, turns, seed=turns)]
ATTENTIONS = [
    "eager",
    "sdpa",
    "varlen",
    pytest.param(
        "flex_attention",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="flex attention has no backward pass on a CPU"
        ),
    ),
    pytest.param(
        "flash_attention_2", marks=pytest.mark.skip(reason="needs the flash-attn library and a GPU")
    ),
]


@pytest.fixture(scope="module")
def rows(builtin):
    "Twelve prepared conversations with answers of very different lengths."
    raw = DatasetDict(train=Dataset.from_list([{"messages": chat} for chat in CHATS]))
    return prepare_datasets(raw, builtin[1])["train"]


@pytest.fixture(scope="module", params=ATTENTIONS)
def adapted(request):
    "The built-in model in float32 with an adapter whose every weight gets a gradient."
    cfg = ModelSettings(quantization="none", dtype="float32", attn_implementation=request.param)
    return stir(setup_lora(setup_model(cfg=cfg)[0], LoraSettings(r=4)), 0.02).eval()


def gradient_of(model, batches, trained):
    "Loss and gradient, summed over batches and divided by the trained tokens of all."
    model.zero_grad()
    loss = 0
    for batch in batches:
        part = model(**batch, num_items_in_batch=trained, use_cache=False).loss
        part.backward()
        loss += part.item()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def count_trained(batches):
    return sum((batch["labels"][:, 1:] != -100).sum().item() for batch in batches)


@pytest.fixture(scope="module")
def alone(adapted, rows):
    "Loss and gradient of the conversations one by one, and their trained tokens."
    batches = [
        {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
        for row in rows
    ]
    trained = count_trained(batches)
    return *gradient_of(adapted, batches, trained), trained


def assert_same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert (found[1] - wanted[1]).norm() < 1e-5 * wanted[1].norm()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("flatten", [False, True], ids=["stacked", "flattened"])
def test_gradient_of_packed_rows(flatten, checkpointing, adapted, alone, rows):
    packed = pack(rows, 256)
    assert 1 < len(packed) < len(rows) / 2
    batch = PackCollator(0, 8, flatten)(list(packed))
    assert (batch["input_ids"].shape[0] == 1) == flatten and "attention_mask" not in batch
    trained = alone[2]
    assert count_trained([batch]) == trained
    if checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.train()
    try:
        packed_loss, packed_gradient = gradient_of(adapted, [batch], trained)
    finally:
        adapted.gradient_checkpointing_disable()
        adapted.eval()
    assert_same((packed_loss, packed_gradient), alone)


@pytest.mark.parametrize("how", ["positions run on", "mask of ones"])
def test_lost_boundaries_show_in_the_gradient(how, adapted, alone, rows):
    batch = PackCollator(0)(list(pack(rows, 256)))
    if how == "positions run on":
        batch["position_ids"] = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])
    else:
        batch["attention_mask"] = torch.ones_like(batch["labels"])
    loss, gradient, trained = alone
    if how == "mask of ones" and adapted.config._attn_implementation == "varlen":
        return assert_same(gradient_of(adapted, [batch], trained), alone)
    wrong_loss, wrong_gradient = gradient_of(adapted, [batch], trained)
    assert wrong_loss != pytest.approx(loss, rel=1e-3)
    assert (wrong_gradient - gradient).norm() > 0.01 * gradient.norm()


def fewest(lengths, capacity):
    "The least number of rows that hold everything, by trying all ways."
    best = {0: (0, capacity)}  # rows that are in -> (packed rows, tokens in the last of them)
    for taken in range(1 << len(lengths)):
        if taken not in best:
            continue
        count, used = best[taken]
        for i, length in enumerate(lengths):
            if not taken >> i & 1:
                fits = used + length <= capacity
                state = (count, used + length) if fits else (count + 1, length)
                both = taken | 1 << i
                best[both] = min(best.get(both, state), state)
    return best[(1 << len(lengths)) - 1][0]


@given(st.lists(st.integers(1, 20), max_size=8))
def test_packer_is_near_the_best(lengths):
    bins, best = best_fit(np.array(lengths, int), 20), fewest(lengths, 20)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert best <= len(bins) <= 11 / 9 * best + 1


@given(st.lists(st.integers(1, 100), max_size=300), st.integers(100, 150))
def test_packer_keeps_every_row_once(lengths, capacity):
    bins = best_fit(np.array(lengths, int), capacity)
    filled = [sum(lengths[row] for row in rows) for rows in bins]
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(0 < tokens <= capacity for tokens in filled)
    assert sum(2 * tokens <= capacity for tokens in filled) <= 1  # two such rows would be one


@pytest.mark.parametrize("seed", range(4))
def test_packed_rows_hold_the_conversations(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, 450)
    ids = [rng.integers(5, 9000, n).tolist() for n in lengths]
    labels = [[i if rng.random() < 0.5 else -100 for i in row] for row in ids]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": labels, "length": lengths})
    dataset = dataset.select(rng.permutation(450)[:400])
    found = []
    for row in pack(dataset, 64):
        assert len(row["input_ids"]) == len(row["labels"]) == row["length"] <= 64
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for a, b in itertools.pairwise([*starts, row["length"]]):
            assert row["position_ids"][a:b] == list(range(b - a))
            assert row["labels"][a] == -100
            found.append((row["input_ids"][a:b], row["labels"][a + 1 : b]))
    wanted = [(row["input_ids"], row["labels"][1:]) for row in dataset]
    assert sorted(found) == sorted(wanted)


def test_a_row_too_long_to_pack(refused):
    dataset = Dataset.from_dict({"input_ids": [[1] * 9], "labels": [[1] * 9], "length": [9]})
    with refused(DataError, "9 tokens; `max_length`: 8"):
        pack(dataset, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_can_be_packed(family, dtype):
    model = tiny_model(family, use_cache=False).to(dtype)
    for attention in ("as it is", "varlen"):
        if attention == "varlen" and not use_varlen(model):
            continue
        for flatten in (False, True):
            check_packing(model, PackCollator(0, 8, flatten))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "family, config",
    [
        ("lfm2", dict(layer_types=["conv", "full_attention"])),
        ("mamba", {}),
        ("bloom", dict(n_layer=2, n_head=2)),
        ("llama", dict(use_cache=True)),
    ],
)
def test_models_that_cannot_be_packed(family, config, dtype, refused):
    model = tiny_model(family, **{"use_cache": False} | config).to(dtype)
    with refused(ConfigError, "see each other", family, "`data.packing: false`"):
        check_packing(model, PackCollator(0))


def test_evaluation_loss_is_per_token(builtin, rows, tmp_path):
    tokenizer = builtin[1]
    model = setup_lora(setup_model(cfg=ModelSettings(quantization="none"))[0], LoraSettings(r=4))
    wanted = held_out_loss(model, tokenizer, CHATS)
    for data, batch_size in ((rows, 1), (rows, 3), (pack(rows, 256), 1), (pack(rows, 256), 2)):
        cfg = TrainingSettings(batch_size=batch_size, max_steps=1)
        trainer = create_trainer(model, tokenizer, data, data, str(tmp_path), cfg)
        output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "evaluation")
        assert output.metrics["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    assert not model.config.use_cache


def test_a_run_with_packing(tmp_path, capsys):
    changes = ("data.packing=true", "training.max_steps=3", "training.batch_size=2")
    small = ("training.gradient_accumulation_steps=2", "training.logging_steps=3")
    split = "data.split=[9, 1, 0]"
    run = run_training(RunConfig().override(*changes, *small, split, f"output_dir={tmp_path}"))
    assert run.history.rows[-1]["eval_loss"] < run.history.rows[-1]["loss"]
    output = capsys.readouterr().out
    found = re.search(r"train: 792 conversations, packed into (\d+) row\(s\); ", output)
    held = 4 * 792 / int(found[1])
    assert f"An optimizer step holds 4 rows: about {held:.0f} of 792 conversations." in output
