"""The path from a model folder to a reloaded adapter, for several model families."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForCausalLM

from lorabook.config import DataSettings, LoraSettings, ModelSettings, TrainingSettings
from lorabook.data.batch import prepare_datasets
from lorabook.export.save import save_model
from lorabook.infer.generate import generate
from lorabook.model.adapter import setup_lora
from lorabook.model.load import setup_model
from lorabook.testing import FAMILIES, sample_chats, save_tiny_model
from lorabook.train.trainer import create_trainer, get_history


@pytest.mark.parametrize("family", FAMILIES)
def test_train_save_reload(family, tmp_path):
    name = save_tiny_model(tmp_path / family, family)
    model, tokenizer = setup_model(name, 0, ModelSettings(quantization="none"))
    model = setup_lora(model, LoraSettings(r=4))
    raw = DatasetDict(
        train=Dataset.from_list([{"messages": chat} for chat in sample_chats(16)]),
        validation=Dataset.from_list([{"messages": chat} for chat in sample_chats(4, seed=1)]),
    )
    data = prepare_datasets(raw, tokenizer, DataSettings())
    cfg = TrainingSettings(
        batch_size=8,
        gradient_accumulation_steps=1,
        max_steps=6,
        logging_steps=3,
        learning_rate=1e-2,
    )
    trainer = create_trainer(
        model, tokenizer, data["train"], data["validation"], str(tmp_path / "out"), cfg
    )
    trainer.train()
    losses = get_history(trainer).column("eval_loss")[1]
    assert losses[-1] < losses[0]

    saved = save_model(model, tokenizer, tmp_path / "out", name)
    again = AutoPeftModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    ids = torch.tensor([data["train"][0]["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(again.eval()(ids).logits, model.eval()(ids).logits, atol=1e-5)
    assert len(generate(model, tokenizer, ["amber basil."], max_new_tokens=4)) == 1
