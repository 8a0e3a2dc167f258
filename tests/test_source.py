"""Conversations come out of any file as they went in, and splits share no question."""

import json
import os
import pickle
import re
import tracemalloc
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabook.config import DataSettings
from lorabook.data import source as module
from lorabook.data.duplicates import find_near_duplicates, group_pairs, jaccard, shingles
from lorabook.data.source import load_and_prepare_data

WHOLE = DataSettings(split=[1, 0, 0])
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TOOL = {"role": "tool", "content": "5", "tool_call_id": "1", "name": "f"}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def calls(arguments, **fields):
    function = {"name": "f", "arguments": arguments}
    call = {"id": "1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]} | fields


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def load(tmp_path, capsys):
    "Load rows from a file: the train split, and what was printed."

    def function(rows, cfg=WHOLE):
        data = load_and_prepare_data(write(tmp_path / "mine.jsonl", rows), cfg)
        return data["train"], capsys.readouterr().out

    return function


def one(load, *messages, **columns):
    "The messages of a row after loading."
    return load([{"messages": list(messages), **columns}])[0][0]["messages"]


ARGUMENTS = {
    "nested": {"a": {"b": [{"c": 1}, {"d": [2, []]}]}},
    "other keys": {"city": "Málaga", "天气": "☔ \u2028 😀"},
    "null": {"a": None, "b": [None]},
    "empty": {},
    "empty inside": {"a": [], "b": {}, "c": ""},
    "numbers": {"a": 1 / 3, "b": 1e-12, "c": 2**70, "d": -0.0, "e": 12.3456, "f": 1e300},
    "truth": {"a": True, "b": 1, "c": 1.0},
    "text": '{"a":  1}',
    "text that is a number": "5",
    "nothing": None,
}


def test_tool_calls_come_out_as_they_went_in(load):
    rows = [{"messages": [USER, calls(a), TOOL, ANSWER | {"n": i}]} for i, a in
            enumerate(ARGUMENTS.values())]  # fmt: skip
    data, _ = load(rows)
    stored = {row["messages"][3]["n"]: row["messages"] for row in data}
    for i, row in enumerate(rows):
        assert repr(stored[i]) == repr(row["messages"])


leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
leaf |= st.text(st.characters(exclude_categories=["Cs"]))
key = st.text("ab天", max_size=3)
value = st.recursive(
    leaf,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(key, v, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(key, value, max_size=3), min_size=1, max_size=4))
@settings(max_examples=20)
def test_any_arguments_come_out_as_they_went_in(arguments):
    rows = [([module._as_json(calls(a), "row")], module._as_json([a], "row")) for a in arguments]
    data = module._store(iter(rows))
    assert [row["messages"] for row in data] == [[calls(a)] for a in arguments]
    assert data["tools"][:] == [[a] for a in arguments]
    assert data.select(range(len(data))[::-1])[0]["tools"] == [arguments[-1]]


def test_a_stored_row_survives_what_is_done_with_it(load, tmp_path):
    rows = [{"messages": [USER, calls({"a": 1 / 3, str(i): None}), TOOL, ANSWER]} for i in range(5)]
    data, _ = load(rows)
    first = data[0]["messages"]
    assert pickle.loads(pickle.dumps(data))[0]["messages"] == first
    assert data.filter(lambda row: True)[0]["messages"] == first
    assert (
        data.map(lambda row: {"n": len(row["messages"])}, remove_columns="messages")["n"][:]
        == [4] * 5
    )
    data.to_parquet(tmp_path / "again.parquet")
    again = load_and_prepare_data(str(tmp_path / "again.parquet"), WHOLE)["train"]
    assert {repr(m) for m in again["messages"]} == {repr(m) for m in data["messages"]}


@pytest.mark.parametrize("fields", [
    {"reasoning_content": "hm"}, {"thinking": ""}, {"name": "Ann"}, {"weight": 1}, {"mood": [1]},
])  # fmt: skip
def test_fields_are_kept(fields, load):
    assert one(load, USER, ANSWER | fields) == [USER, ANSWER | fields]


def test_null_fields_say_nothing(load, tmp_path):
    null = {"tool_calls": None, "weight": None, "name": None, "function_call": None, "mood": None}
    assert one(load, USER | null, ANSWER | null) == [USER, ANSWER]
    assert one(load, USER, ANSWER | {"tool_calls": []}) == [USER, ANSWER]
    rows = [{"messages": [USER, calls({"a": 1}), TOOL]}, {"messages": [USER, ANSWER | {"x": "y"}]}]
    Dataset.from_list(rows, on_mixed_types=None).to_parquet(tmp_path / "mine.parquet")
    data = load_and_prepare_data(str(tmp_path / "mine.parquet"), WHOLE)["train"]
    stored = sorted(data["messages"], key=len)
    assert stored == [[USER, ANSWER | {"x": "y"}], [USER, calls({"a": 1}), TOOL]]


def test_what_is_unknown_is_named_once(load):
    rows = [{"messages": [USER | {"mood": i}, ANSWER], "id": i + 1} for i in range(3)]
    rows.append({"messages": [USER, calls({"a": None}), TOOL]})
    _, printed = load(rows)
    assert printed.count("mood") == printed.count("columns not used: id") == 1
    assert "rows with null in tools or tool calls: 1" in printed
    _, printed = load([{"messages": [USER, ANSWER]}])
    assert printed.splitlines()[0].endswith("mine.jsonl: messages, 1 rows, 0 repeats left out")


@pytest.mark.parametrize("given, weight", [
    ({"weight": 0}, 0), ({"weight": 0.0}, 0), ({"weight": False}, 0), ({"weight": 1.0}, 1),
    ({"train": False}, 0), ({"training": False}, 0), ({"train": True}, 1),
    ({"train": False, "weight": 0}, 0), ({"weight": None, "training": True}, 1),
])  # fmt: skip
def test_weight(given, weight, load):
    messages = one(load, USER | {"weight": 0}, ANSWER | given, USER | {"train": False}, ANSWER)
    assert messages == [USER, ANSWER | {"weight": weight}, USER, ANSWER]
    assert repr(messages[1]["weight"]) == str(weight)


@pytest.mark.parametrize("empty", [None, "", [], "[]"])
@pytest.mark.parametrize("given", [[SCHEMA], json.dumps([SCHEMA]), [json.dumps(SCHEMA)]])
def test_tools(given, empty, load):
    rows = [
        {"messages": [USER, ANSWER], "tools": given},
        {"messages": [USER, ANSWER | {"content": "c"}], "tools": empty},
    ]
    data, printed = load(rows)
    assert sorted(data["tools"], key=bool) == [None, [SCHEMA]]
    assert "not used" not in printed
    data, _ = load(rows[1:])
    assert data.column_names == ["messages"]


def test_tools_of_one_file_only(tmp_path):
    rows = {"messages": [ANSWER]}, {"messages": [USER, ANSWER], "tools": [SCHEMA]}
    files = [write(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(rows)]
    data = load_and_prepare_data(files[0], DataSettings(split=[1, 0, 0], test_file=files[1]))
    assert [data[name]["tools"][:] for name in ("train", "test")] == [[None], [[SCHEMA]]]
    assert data["train"].features == data["test"].features


def test_sharegpt_of_llama_factory(load):
    call, more = ({"name": "f", "arguments": {"x": x}} for x in (1, 2))
    said = [
        ("system", ""), ("human", "a"), ("function_call", json.dumps(call)), ("observation", ""),
        ("gpt", "b"), ("human", "a"), ("function_call", json.dumps([call, more])),
        ("observation", "1"), ("observation", "2"), ("gpt", "b"),
    ]  # fmt: skip
    turns = [{"from": role, "value": text} for role, text in said]
    data, printed = load([{"conversations": turns, "tools": json.dumps([SCHEMA])}])
    asked = lambda *c: {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function} for function in c],
    }
    tool = lambda text: {"role": "tool", "content": text}
    assert data[0]["messages"] == [
        {"role": "system", "content": ""}, USER, asked(call), tool(""), ANSWER,
        USER, asked(call, more), tool("1"), tool("2"), ANSWER,
    ]  # fmt: skip
    assert data[0]["tools"] == [SCHEMA] and "ShareGPT" in printed


def test_other_ways_to_write_messages(load):
    turns = [
        {"from": "human", "value": "a", "weight": 0},
        {"from": "gpt", "value": "b", "weight": 1},
    ]
    expected = [USER, ANSWER | {"weight": 1}]
    for row in (
        {"conversations": turns},
        {"messages": json.dumps(expected)},
        {"messages": list(map(json.dumps, expected))},
        {"conversations": expected},
        {"prompt": expected[:1], "completion": expected[1:]},
    ):
        assert load([row])[0][0]["messages"] == expected


def test_parts_of_text_are_kept(load):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]
    messages = [USER | {"content": parts}, ANSWER | {"content": parts}]
    assert one(load, *messages) == messages


def test_system_prompt_is_put_where_none_is(tmp_path):
    rows = [{"messages": [{"role": role, "content": "c"}, USER, ANSWER | {"content": role}]}
            for role in ("system", "developer")]  # fmt: skip
    rows.append({"messages": [USER, ANSWER]})
    cfg = DataSettings(split=[1, 0, 0], system_prompt="Be brief.")
    data = load_and_prepare_data(write(tmp_path / "mine.jsonl", rows), cfg)["train"]
    first = sorted((m[0]["role"], m[0]["content"]) for m in data["messages"])
    assert first == [("developer", "c"), ("system", "Be brief."), ("system", "c")]


def test_repeats_are_left_out_and_counted(load):
    rows = [{"messages": [USER, calls({"x": 1, "y": 2}), TOOL]}, {"messages": [USER, ANSWER]}]
    turned = {"messages": [dict(reversed(m.items())) for m in rows[0]["messages"]]}
    other = rows[0] | {"tools": [SCHEMA]}
    data, printed = load([*rows, turned, rows[1], other])
    assert len(data) == 3 and "5 rows, 2 repeats left out" in printed


def test_a_changed_file_is_read_again(tmp_path):
    path, times = tmp_path / "mine.jsonl", None
    for text in "abc":
        write(path, [{"prompt": text, "completion": "b"}])
        times = times or (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        os.utime(path, ns=times)  # same path, size and time
        data = load_and_prepare_data(str(path), WHOLE)["train"]
        assert data[0]["messages"][0]["content"] == text
        assert data.map(lambda row: {"t": row["messages"][0]["content"]})["t"][:] == [text]


def test_a_failed_read_leaves_no_file(tmp_path, refused):
    before = sorted(Path(module._FOLDER.name).iterdir())
    rows = [{"prompt": str(i), "completion": "b"} for i in range(3000)]
    path = write(tmp_path / "mine.jsonl", [*rows, {"prompt": "a"}])
    with refused(module.DataError, "mine.jsonl, line 3001"):
        load_and_prepare_data(path)
    assert sorted(Path(module._FOLDER.name).iterdir()) == before


def test_memory_is_bounded(tmp_path):
    path = tmp_path / "mine.jsonl"
    with path.open("w") as file:
        for i in range(8000):
            file.write(json.dumps({"prompt": f"{i}", "completion": f"{i} {'long ' * 1000}"}) + "\n")
    tracemalloc.start()
    try:
        data = load_and_prepare_data(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(map(len, data.values())) == 8000
    assert path.stat().st_size > 40e6 and peak < 20e6, peak


LONG = "one two three four five six seven eight nine ten eleven twelve".split()


def near(i, change):
    "A prompt of 40 words; `change` alters case, punctuation or one word."
    words = [f"{word}x{i}y{n}" for n in range(4) for word in LONG[:10]]
    words = words if change < 3 else [*words[:change], "changed", *words[change + 1 :]]
    text = " ".join(words)
    return [text, text.upper(), f"  {text.replace(' ', ', ')}!", text][min(change, 3)]


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_are_kept_on_one_side(seed, tmp_path, capsys):
    rows = [{"prompt": near(i, c), "completion": f"{c}"} for i in range(40) for c in (0, 1, 2, 9)]
    rows += [{"prompt": f"other question {i}", "completion": "b"} for i in range(40)]
    data = load_and_prepare_data(write(tmp_path / "mine.jsonl", rows), seed=seed)
    sides = {}
    for name, split in data.items():
        for messages in split["messages"]:
            for question in re.findall(r"onex(\d+)y0", messages[0]["content"].casefold()):
                sides.setdefault(question, set()).add(name)
    assert len(sides) == 40 and all(len(names) == 1 for names in sides.values())
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].endswith("near-duplicate prompts kept together: 160 rows in 40 groups")
    assert sum(map(len, data.values())) == 200 and len(data["train"]) > 150


@pytest.mark.parametrize("key", ["validation_file", "test_file"])
def test_near_duplicates_in_two_files_are_a_warning(key, tmp_path, capsys):
    rows = [{"prompt": near(i, 0), "completion": "b"} for i in range(20)]
    other = [{"prompt": near(i, 1 + i % 2), "completion": "b"} for i in range(15, 25)]
    cfg = DataSettings(split=[1, 0, 0], **{key: write(tmp_path / "other.jsonl", other)})
    data = load_and_prepare_data(write(tmp_path / "train.jsonl", rows), cfg)
    name, printed = key.removesuffix("_file"), capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("warning"))
    assert f"5 rows of {name} have near-duplicate prompts in train" in line
    shown = re.findall(r"'([^']*)'", line)
    assert [text.strip(" ,")[:7] for text in shown] == ["onex15y"] * 2
    assert [len(data[n]) for n in ("train", name)] == [20, 10] and "together" not in printed


def test_a_template_is_no_group(tmp_path, capsys):
    frame = " ".join(f"w{i}" for i in range(100))
    rows = [{"prompt": f"{frame} {i}", "completion": f"{c}"} for i in range(40) for c in "ab"]
    rows += [{"prompt": near(i, c), "completion": "b"} for i in range(5) for c in (0, 1)]
    data = load_and_prepare_data(write(tmp_path / "mine.jsonl", rows))
    printed = capsys.readouterr().out
    assert "the prompts of 80 of 90 rows are much like 'w0 w1 " in printed
    assert "kept together: 10 rows in 5 groups" in printed and "warning" not in printed
    prompts = [{m[0]["content"] for m in split["messages"]} for split in data.values()]
    assert sum(map(len, prompts)) == 50 == len(set.union(*prompts))
    assert len(data["validation"]) and len(data["test"])


def test_one_system_prompt_makes_no_near_duplicates(tmp_path, capsys):
    system = {"role": "system", "content": "You are a helpful assistant of ours. " * 30}
    rows = [{"messages": [system, USER | {"content": f"q{i}"}, ANSWER]} for i in range(30)]
    load_and_prepare_data(write(tmp_path / "mine.jsonl", rows))
    assert "near-duplicate" not in capsys.readouterr().out


def test_builtin_has_no_near_duplicates(capsys):
    data = load_and_prepare_data()
    assert {name: len(split) for name, split in data.items()} == {
        "train": 720,
        "validation": 80,
        "test": 80,
    }
    assert "near" not in capsys.readouterr().out


words = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12).map(" ".join)


@given(st.lists(words, max_size=25))
def test_pairs_are_alike_and_equal_texts_are_found(texts):
    pairs, parts = find_near_duplicates(texts), list(map(shingles, texts))
    group = group_pairs(len(texts), pairs)
    assert all(jaccard(parts[i], parts[j]) >= 0.8 for i, j in pairs)
    assert len(set(group)) == len(texts) - len(pairs)
    assert all(group[i] == group[j] for i, a in enumerate(parts) for j, b in enumerate(parts)
               if a == b)  # fmt: skip
