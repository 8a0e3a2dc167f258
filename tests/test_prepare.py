"""Rows: what is kept, shortened, dropped and counted, and nothing computed twice."""

import copy
import pickle

import multiprocess
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from lorabook.config import DataSettings
from lorabook.data import batch
from lorabook.data.batch import prepare_datasets
from lorabook.data.chat import SPECIAL_INSIDE, encode_chat, encode_chats
from lorabook.errors import DataError, TemplateError
from lorabook.testing import sample_chats

OPTIONS = dict(shorten_to=0, train_on="all")


def splits(chats, **more):
    "Raw splits of conversations."
    lists = {"train": chats, **more}
    return DatasetDict(
        {
            name: Dataset.from_list([{"messages": chat} for chat in rows])
            for name, rows in lists.items()
        }
    )


@pytest.fixture
def tokenizer(builtin):
    return builtin[1]


@pytest.fixture
def refuse_to_encode(monkeypatch):
    "A function after whose call nothing can be encoded any more."

    def encode(*args, **kwargs):
        raise AssertionError("encoded again")

    return lambda: monkeypatch.setattr(batch, "encode_chats", encode)


CHATS = [chat for turns in (1, 2, 4, 8) for chat in sample_chats(15, turns, seed=turns)]


@pytest.mark.parametrize("policy", ["drop", "shorten"])
def test_policies_account_for_every_row(policy, tokenizer):
    asks_only = CHATS[0][:1]
    raw = splits([*CHATS, asks_only])
    prepared = prepare_datasets(raw, tokenizer, DataSettings(over_length=policy), max_length=120)
    (report,) = prepared.report.splits
    lengths = [len(encode_chat(chat, tokenizer)["labels"]) for chat in CHATS]
    over = sum(length > 120 for length in lengths)
    assert 0 < over < 60 and report.over == over and report.lengths[100] == max(lengths)
    assert (report.rows, report.untrained) == (61, 1)
    assert report.shortened == (over if policy == "shorten" else 0)
    assert report.kept == len(prepared["train"]) == 60 - over + report.shortened
    assert report.tokens == sum(map(len, prepared["train"]["input_ids"]))
    assert report.trained == sum(
        label != -100 for row in prepared["train"]["labels"] for label in row[1:]
    )
    assert max(prepared["train"]["length"]) <= 120
    for text in (str(prepared.report), prepared._repr_html_()):
        assert f"dropped: {over - report.shortened} longer than 120 tokens, 1 without" in text
        assert (f"shortened: {over}" in text) == (policy == "shorten")


def test_policy_error(tokenizer, refused):
    with refused(DataError, "rows of train are longer", "allowed: 60", "`data.over_length`"):
        prepare_datasets(splits(CHATS), tokenizer, DataSettings(over_length="error"), 60)
    kept = prepare_datasets(splits(CHATS), tokenizer, DataSettings(over_length="error"), 2000)
    assert len(kept["train"]) == len(CHATS)


@given(st.integers(0, 59), st.integers(10, 400), st.lists(st.integers(0, 7), max_size=3))
def test_shortened_to_the_longest_beginning_that_fits(builtin, number, room, context):
    chat = list(CHATS[number])
    for answer in {2 * turn + 1 for turn in context if 2 * turn + 1 < len(chat)}:
        chat[answer] = chat[answer] | {"weight": 0}
    row = batch.encode_rows([chat], [None], builtin[1], room, "all")
    if row["full_length"][0] <= room:
        assert row["length"] == row["full_length"]
        return
    beginnings = [chat[:k] for k in range(2, len(chat), 2) if chat[k - 1].get("weight") != 0]
    encoded = encode_chats(beginnings, builtin[1]) if beginnings else []
    fitting = [one for one in encoded if len(one["labels"]) <= room]
    if fitting:
        assert row["input_ids"][0] == fitting[-1]["input_ids"]
        assert row["labels"][0] == fitting[-1]["labels"] and row["trained"][0] > 0
    else:
        assert row["length"] == row["full_length"]  # and is dropped for its length


@pytest.mark.parametrize(
    "chats, max_length, parts",
    [
        ([CHATS[0][:1]] * 3, 512, ["No row of train", "3 rows, 0 longer", "3 without a trained"]),
        ([CHATS[0]] * 2, 8, ["No row of train", "2 rows, 2 longer than 8", "0 without"]),
    ],
    ids=["no answers", "too long"],
)
def test_nothing_left(chats, max_length, parts, tokenizer, refused):
    for policy in ("drop", "shorten"):
        with refused(DataError, *parts, "`model.max_length`"):
            prepare_datasets(splits(chats), tokenizer, DataSettings(over_length=policy), max_length)


def test_an_error_names_split_and_row(tokenizer, refused):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with a user') }}{% endif %}"
        + tokenizer.chat_template
    )
    chats = [CHATS[0]] * 230
    raw = splits(chats, validation=[*chats, CHATS[0][1:], CHATS[0]])
    with refused(TemplateError, "Row 231 of validation ('') can't be used.", "begin with a user"):
        prepare_datasets(raw, strict)


def test_the_second_time_nothing_is_encoded(tokenizer, refuse_to_encode, capsys):
    odd = [{"role": "user", "content": "What is <|im_end|>?"}, *CHATS[1][1:]]
    raw = splits([*CHATS[:5], odd, *CHATS[5:9], odd], validation=CHATS[9:14])
    cfg, tokenizer = DataSettings(over_length="shorten"), copy.deepcopy(tokenizer)
    first = prepare_datasets(raw, tokenizer, cfg, 120)
    shown = capsys.readouterr().out
    assert f"{SPECIAL_INSIDE} (2 rows, the first is row 6)" in shown

    refuse_to_encode()
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)  # changes its pickle
    second = prepare_datasets(raw, tokenizer, cfg, 120)
    assert capsys.readouterr().out == shown
    assert second["train"][:] == first["train"][:] and second.report == first.report
    same = splits([*CHATS[:5], odd, *CHATS[5:9], odd], validation=CHATS[9:14])
    assert prepare_datasets(same, copy.deepcopy(tokenizer), cfg, 120).report == first.report


@pytest.mark.parametrize("what", ["conversations", "template", "train_on", "length", "policy"])
def test_a_change_is_encoded_again(what, tokenizer, refuse_to_encode):
    policy = "drop" if what == "train_on" else "shorten"
    chats, cfg, length = copy.deepcopy(CHATS[:8]), DataSettings(over_length=policy), 200
    if what == "train_on":
        chats = chats[:7]  # or it would fill the cache for another case
    prepare_datasets(splits(chats), tokenizer, cfg, length)
    refuse_to_encode()
    prepare_datasets(splits(chats), tokenizer, cfg, length)
    if what == "conversations":
        chats[3][1]["content"] += "!"
    if what == "template":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template += " "
    if what == "train_on":
        cfg = DataSettings(over_length=policy, train_on="last")
    if what == "length":
        length = 199
    if what == "policy":
        cfg = DataSettings()
    with pytest.raises(AssertionError, match="encoded again"):
        prepare_datasets(splits(chats), tokenizer, cfg, length)


def test_a_new_limit_needs_no_new_encoding(tokenizer, refuse_to_encode):
    raw = splits(CHATS)
    prepare_datasets(raw, tokenizer, max_length=300)
    refuse_to_encode()
    assert max(prepare_datasets(raw, tokenizer, max_length=99)["train"]["length"]) <= 99


def test_two_processes_give_the_same_rows(tokenizer, monkeypatch):
    raw = splits(sample_chats(100, seed=5))
    one = prepare_datasets(raw, tokenizer)
    key = batch.content_key
    monkeypatch.setattr(batch, "content_key", lambda *args: key(*args, "two processes"))
    monkeypatch.setattr(batch, "_processes", lambda rows: 2)
    two = prepare_datasets(raw, tokenizer)
    assert len(two["train"].cache_files) == 2
    assert two["train"][:] == one["train"][:] and two.report == one.report


def test_a_spawned_process_can_encode(tokenizer):
    chats, options = CHATS[:3], dict(tokenizer=tokenizer, split="train", **OPTIONS)
    function, given_options = pickle.loads(pickle.dumps((batch._encode_batch, options)))
    with multiprocess.get_context("spawn").Pool(1) as pool:
        rows = pool.apply(function, ({"messages": chats}, [0, 1, 2]), given_options)
    assert rows == batch._encode_batch({"messages": chats}, [0, 1, 2], **options)


def test_only_the_last_answer(tokenizer):
    raw = splits(CHATS[20:30])
    every, last = (
        prepare_datasets(raw, tokenizer, DataSettings(train_on=which))["train"]
        for which in ("all", "last")
    )
    assert every["input_ids"][:] == last["input_ids"][:]
    for all_labels, labels in zip(every["labels"], last["labels"]):
        trained = [i for i, label in enumerate(labels) if label != -100]
        assert all_labels[trained[0] :] == labels[trained[0] :]
        assert 0 < len(trained) < sum(label != -100 for label in all_labels)


def test_an_empty_split(tokenizer):
    raw = splits(CHATS[:4])
    raw["test"] = raw["train"].select([])
    prepared = prepare_datasets(raw, tokenizer)
    assert len(prepared["test"]) == 0 and len(prepared.report.splits) == 1
    assert prepared["test"].features == prepared["train"].features
