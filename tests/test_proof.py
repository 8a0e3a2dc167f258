"""What a comparison calls a good run, a bad one and one that learned by heart."""

import random
from functools import partial

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from lorabook.builtin import make_dialogue
from lorabook.config import LoraSettings, ModelSettings, TrainingSettings
from lorabook.data.batch import prepare_datasets
from lorabook.data.source import load_and_prepare_data
from lorabook.infer.compare import compare
from lorabook.infer.evaluate import evaluate
from lorabook.infer.heldout import rows_in_train
from lorabook.infer.statistics import difference_interval, luck
from lorabook.model.adapter import setup_lora
from lorabook.model.load import setup_model
from lorabook.testing import in_processes, sample_chats
from lorabook.train.trainer import create_trainer, get_history

PLAIN = ModelSettings(quantization="none")


@pytest.fixture(scope="module")
def data():
    return load_and_prepare_data()


@pytest.fixture(scope="module")
def test(data):
    "The conversations that all are asked, and what is not the task."
    rng = random.Random(0)
    return data["test"].select(range(24)), [make_dialogue(rng) for _ in range(12)]


@pytest.fixture(scope="module")
def base(builtin, test):
    return evaluate(*builtin, test[0], general_text=test[1])


def train(rows, folder, steps, learning_rate):
    "An adapter and its tokenizer, and the loss that was logged last."
    model, tokenizer = setup_model(cfg=PLAIN)
    model = setup_lora(model, LoraSettings(r=8, dropout=0.0))
    settings = TrainingSettings(
        batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=steps,
        learning_rate=learning_rate,
        logging_steps=4,
    )
    data = prepare_datasets(DatasetDict(train=rows), tokenizer)
    trainer = create_trainer(model, tokenizer, data["train"], None, str(folder), settings)
    trainer.train()
    return model, tokenizer, get_history(trainer).column("loss")[1][-1]


def test_a_short_training_is_better(data, test, base, tmp_path):
    *adapter, loss = train(data["train"], tmp_path, 30, 2e-3)
    after = evaluate(*adapter, test[0], general_text=test[1])
    found = compare(base, after, loss)
    assert found.kind == "better" and found.verdict.startswith("Better: the adapter beats the base")
    assert found.measures["exact_match"].interval[0] > 0.2 and found.measures["loss"].shown == 1
    assert after.intervals["exact_match"][0] > base.intervals["exact_match"][1]
    assert len(found.changes(10)) == 10 and not found.worse()
    assert found.measures["general_loss"].shown == -1  # the price, which is said
    assert any("General ability was lost" in text for text in found.warnings)
    swapped = compare(after, base)
    assert swapped.kind in ("worse", "broken") and len(swapped.worse(24)) == 24


def test_a_learning_rate_a_hundred_times_as_high_is_broken(data, test, base, tmp_path):
    *adapter, loss = train(data["train"], tmp_path, 12, 0.2)
    after = evaluate(*adapter, test[0], general_text=test[1])
    for known in (loss, None):
        found = compare(base, after, known)
        assert found.kind == "broken", found
        assert repr(found.changes(1)[0].after[:20])[1:-1] in found.verdict


def test_twelve_rows_for_long_are_over_fitted(data, builtin, tmp_path):
    "What is asked afterwards has nothing to do with what was learned."
    few, others = data["train"].select(range(12)), sample_chats(16, turns=1)
    unrelated = Dataset.from_dict({"messages": others})
    *adapter, loss = train(few, tmp_path, 60, 2e-3)
    ask = partial(evaluate, split=unrelated, max_new_tokens=40)
    found = compare(ask(*builtin), ask(*adapter), loss)
    assert loss < 0.1
    assert found.kind == "over-fitted" and "knows its training rows" in found.verdict, found
    assert compare(found.before, found.after).kind in ("worse", "broken")


def test_two_processes_score_the_same(builtin, test):
    "An odd number of rows: one process is given a row twice."
    split, general = test[0].select(range(5)), test[1][:3]
    score = partial(evaluate, *builtin, split, general_text=general)
    alone = score()
    for found in in_processes(score):
        assert found.answers == alone.answers and found.values == alone.values
        assert [n for _, n in found.losses] == [n for _, n in alone.losses]
        for ours, theirs in ((found.losses, alone.losses), (found.general, alone.general)):
            assert np.allclose(ours, theirs, rtol=1e-4)


def test_no_test_row_was_trained(data):
    found = rows_in_train(data["train"], data["test"])
    assert (found.rows, found.exact, found.near) == (80, 0, 0)
    assert rows_in_train(data["train"], data["train"].select(range(9))).exact == 9


yes_or_no = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
shares = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12)


@given(st.one_of(yes_or_no, shares))
def test_an_interval_holds_the_difference(pairs):
    before, after = map(np.array, zip(*pairs))
    low, high = difference_interval(before, after)
    assert -1 - 1e-9 <= low <= (after - before).mean() + 1e-9 <= high + 2e-9 <= 1 + 1e-8
    assert difference_interval(after, before) == pytest.approx((-high, -low), abs=1e-9)
    assert 0 <= luck(after - before) <= 1
