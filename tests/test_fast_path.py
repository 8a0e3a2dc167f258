"""Packed rows and the loss on trained positions alone train what the plain path does."""

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import set_seed

from lorabook.config import LoraSettings, TrainingSettings
from lorabook.data.pack import pack
from lorabook.model.adapter import setup_lora
from lorabook.testing import tiny_model
from lorabook.train.trainer import create_trainer, get_history

LENGTHS = [50, 30, 20, 28, 60, 40, 15, 13]  # of the conversations in an optimizer step
STEPS, ROOM = 50, 140  # two packed rows hold the eight


def conversations():
    "For each step, rows of token ids of which the last 40 % are trained."
    draw = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(STEPS):
        rows = []
        for length in LENGTHS:
            ids, prompt = torch.randint(3, 30, [length], generator=draw).tolist(), 6 * length // 10
            labels = [-100] * prompt + ids[prompt:]
            rows.append({"input_ids": ids, "labels": labels, "length": length})
        steps.append(Dataset.from_list(rows))
    return steps


def train(rows, tokenizer, folder, own_loss=None, **settings):
    "The losses of all steps, and the adapter after them."
    set_seed(0)
    model = tiny_model("llama", 512, hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    model = setup_lora(model, LoraSettings(r=8))
    cfg = TrainingSettings(
        max_steps=STEPS,
        learning_rate=5e-3,
        logging_steps=1,
        save_steps=STEPS,
        early_stopping_patience=None,
        train_sampling_strategy="sequential",
        **settings,
    )
    trainer = create_trainer(model, tokenizer, rows, None, folder, cfg)
    assert trainer.own_loss is None  # the check has found the two losses to be the same
    trainer.own_loss = own_loss
    trainer.train()
    adapter = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return torch.tensor(get_history(trainer).column("loss")[1]), adapter


@pytest.fixture(scope="module")
def plain(builtin, tmp_path_factory):
    "Single rows in two micro-batches, full logits."
    rows = concatenate_datasets(conversations())
    folder, accumulated = str(tmp_path_factory.mktemp("plain")), dict(batch_size=4)
    accumulated |= dict(gradient_accumulation_steps=2, gradient_checkpointing=False)
    return train(rows, builtin[1], folder, "the plain path", **accumulated)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("recomputed", [False, True, 0.5])
def test_the_same_losses_and_the_same_adapter(plain, packed, recomputed, builtin, tmp_path):
    steps = conversations()
    if packed:
        steps = [pack(rows, ROOM, "train") for rows in steps]
        assert {len(rows) for rows in steps} == {2}
    losses, adapter = train(
        concatenate_datasets(steps),
        builtin[1],
        str(tmp_path),
        batch_size=2 if packed else 8,
        gradient_accumulation_steps=1,
        gradient_checkpointing=recomputed,
    )
    expected, weights = plain
    assert expected[-1] < expected[0] - 0.2  # something is learnt
    assert torch.allclose(losses, expected, rtol=1e-4, atol=0)
    for name, value in adapter.items():
        assert (value - weights[name]).norm() <= 1e-3 * weights[name].norm(), name
