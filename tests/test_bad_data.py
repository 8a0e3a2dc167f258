"""Bad data is refused, and the message names the file, the line and the field."""

import csv
import json

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from lorabook.config import DataSettings
from lorabook.data.batch import prepare_datasets
from lorabook.data.source import load_and_prepare_data, split_by_prompt
from lorabook.errors import DataError

ROWS = [{"instruction": f"question {i}", "response": f"answer {i}"} for i in range(40)]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def chat(*messages):
    return {"messages": list(messages)}


def text_part(text):
    return {"type": "text", "text": text}


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}

SHAPES = {  # shape -> a row, made of a question and an answer
    "messages": lambda q, a: chat({"role": "user"} | q, {"role": "assistant"} | a),
    "conversations": lambda q, a: {"conversations": [{"from": "human"} | q, {"from": "gpt"} | a]},
    "instruction/response": lambda q, a: q | a,
    "instruction/output": lambda q, a: q | a,
    "prompt/completion": lambda q, a: q | a,
    "prompt/response": lambda q, a: q | a,
}
FIELDS = {"messages": ("content", "content"), "conversations": ("value", "value")}
DAMAGE = {
    "missing": ({}, "is missing"),
    "empty": ("  ", "is empty"),
    "number": (3, "3 (int)"),
    "null": (None, "None (NoneType)"),
    "object": ({"a": 1}, "{'a': 1} (dict)"),
}


def write(path, content):
    "Write rows, text or bytes as they are."
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        path.write_text("\n".join(map(json.dumps, content)))
    return str(path)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("shape", SHAPES)
def test_damaged_answer(shape, damage, tmp_path, refused):
    asked, answered = FIELDS.get(shape) or shape.split("/")
    rows = [SHAPES[shape]({asked: f"q{i}"}, {answered: f"a{i}"}) for i in range(5)]
    value, what = DAMAGE[damage]
    rows[2] = SHAPES[shape]({asked: "q"}, value if damage == "missing" else {answered: value})
    source = write(tmp_path / "mine.jsonl", rows)
    with refused(DataError, "mine.jsonl, line 3", f"`{answered}`", what):
        load_and_prepare_data(source)
    assert issubclass(DataError, ValueError)


@pytest.mark.parametrize("value", ["", 3, None])
def test_damaged_question(value, tmp_path, refused):
    source = write(tmp_path / "mine.jsonl", [*ROWS[:3], {"instruction": value, "response": "a"}])
    with refused(DataError, "mine.jsonl, line 4", "`instruction`", repr(value)):
        load_and_prepare_data(source)


BAD_ROWS = {  # kind -> the second row of a file, the field or what else is named, what was found
    "system is not text": (ROWS[0] | {"system": 5}, "`system`", "5 (int)"),
    "input is not text": (ROWS[0] | {"input": ["a"]}, "`input`", "['a'] (list)"),
    "another shape": (chat(user("a"), assistant("b")), "`instruction`", "columns: messages"),
    "no columns": ({}, "`instruction`", "columns:"),
    "text for an object": ("hello", "object", "'hello' (str)"),
    "number for an object": (5, "object", "5 (int)"),
    "null for an object": (None, "object", "None (NoneType)"),
    "list for an object": (["instruction", "response"], "object", "(list)"),
    "half a character": ({"instruction": "a\ud800", "response": "b"}, "`instruction`", "ud800"),
}
BAD_CHATS = {
    "messages is text": ({"messages": "hello"}, "`messages`", "'hello'"),
    "messages is null": ({"messages": None}, "`messages`", "None"),
    "messages of texts": ({"messages": ["hello"]}, "`messages`", "['hello']"),
    "no messages": ({"messages": []}, "no assistant message", "roles: none"),
    "no answer": (chat(user("a")), "no assistant message", "roles: user"),
    "unknown role": (chat({"role": "usr", "content": "a"}), "message 1 has an unknown role", "usr"),
    "no role": (chat({"content": "a"}), "message 1", "role", "None"),
    "role is a list": (chat({"role": ["user"], "content": "a"}), "message 1", "role", "['user']"),
    "picture": (
        chat(user([text_part("a"), {"type": "image_url", "image_url": "b.png"}]), assistant("b")),
        "message 1",
        "lorabook trains on text only",
        "'image_url'",
    ),
    "part that is no object": (chat(user(["a"]), assistant("b")), "message 1", "text only"),
    "part without text": (chat(user([{"type": "text"}]), assistant("b")), "message 1", "`text`"),
    "no parts": (chat(user([]), assistant("b")), "message 1: the field `content` is empty", "[]"),
    "empty parts": (chat(user("a"), assistant([text_part(" ")])), "message 2", "is empty"),
    "empty tool calls": (
        chat(user("a"), assistant(None) | {"tool_calls": []}),
        "message 2: the field `content` is not text",
        "None (NoneType)",
    ),
    "tool calls of a user": (chat(user("a") | {"tool_calls": [CALL]}), "message 1", "role: user"),
    "tool calls in text": (
        chat(user("a"), assistant("b") | {"tool_calls": "f()"}),
        "message 2: `tool_calls` is no list of calls",
        "'f()'",
    ),
    "tool call without a name": (
        chat(user("a"), assistant("b") | {"tool_calls": [CALL, {"function": {"arguments": "{}"}}]}),
        "message 2: `tool_calls` is no list of calls",
        '"name"',
    ),
    "arguments in a list": (
        chat(user("a"), assistant("b") | {"tool_calls": [{"name": "f", "arguments": [1]}]}),
        "message 2: the arguments of a tool call are no object",
        "[1]",
    ),
    "number as content beside tool calls": (
        chat(user("a"), assistant(5) | {"tool_calls": [CALL]}),
        "message 2: the field `content` is not text",
        "5 (int)",
    ),
    "function_call": (
        chat(user("a"), assistant(None) | {"function_call": {"name": "f", "arguments": "{}"}}),
        "message 2 has a `function_call`",
        "Write `tool_calls`",
    ),
    "answer to no call": (
        chat(user("a"), {"role": "tool", "content": "5"}, assistant("b")),
        "message 2 is a tool's answer to no call",
        "roles: user, tool",
    ),
    "answer to a call of long ago": (
        chat(user("a"), CALLS, user("c"), {"role": "tool", "content": "5"}, assistant("b")),
        "message 4 is a tool's answer to no call",
        "roles: user, assistant, user, tool",
    ),
    "thoughts that are not text": (
        chat(user("a"), assistant("b") | {"reasoning_content": ["c"]}),
        "message 2: the field `reasoning_content` is not text",
        "['c'] (list)",
    ),
    "half a character in a tool call": (
        chat(user("a"), CALLS | {"tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}),
        "message 2 holds something that JSON can't hold",
        "surrogates",
    ),
    "weight of all is 0": (
        chat(user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d") | {"weight": 0}),
        "only assistant messages of weight 0",
        "nothing to learn",
    ),
    "user to be trained": (
        chat(user("a") | {"weight": 1}, assistant("b")),
        "message 1 doesn't say clearly whether it is trained",
        "role user",
    ),
    "weights that disagree": (
        chat(user("a"), assistant("b") | {"weight": 1, "train": False}),
        "message 2 doesn't say clearly whether it is trained",
        "'train': False",
    ),
    **{
        f"weight {value!r}": (
            chat(user("a"), assistant("b") | {"weight": value}),
            "message 2 doesn't say clearly whether it is trained",
            repr(value),
        )
        for value in (2, -1, 0.5, "0", "", [0], {})
    },
    **{
        f"tools {tools!r}": (
            chat(user("a"), assistant("b")) | {"tools": tools},
            "`tools` is no list of tools",
            f"{tools!r:.20}",
        )
        for tools in ("f", {"name": "f"}, ["f"], [{"type": "function"}], 0, [None])
    },
}
BAD_SHAREGPT = {
    "unknown speaker": ({"from": "alien", "value": "a"}, "message 1", "role", "'alien'"),
    "no speaker": ({"value": "a"}, "message 1", "role", "None"),
    "speaker is a list": ({"from": ["human"], "value": "a"}, "message 1", "role", "['human']"),
    "call in words": ({"from": "function_call", "value": "f()"}, "message 1", "`function_call`"),
    "no call": ({"from": "function_call", "value": "[]"}, "message 1", "`function_call`"),
    "call without arguments": (
        {"from": "function_call", "value": '{"name": "f"}'},
        "message 1",
        "`function_call`",
        '{"name": ..., "arguments": {...}}',
    ),
    "observation without a call": ({"from": "observation", "value": "5"}, "message 1", "no call"),
}


@pytest.mark.parametrize("case", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row(case, tmp_path, refused):
    row, *parts = case
    source = write(tmp_path / "mine.jsonl", [ROWS[1], row])
    with refused(DataError, "mine.jsonl, line 2", *parts):
        load_and_prepare_data(source, DataSettings(split=[1, 0, 0]))


@pytest.mark.parametrize("case", BAD_CHATS.values(), ids=BAD_CHATS)
def test_bad_conversation(case, tmp_path, refused):
    row, *parts = case
    source = write(tmp_path / "mine.jsonl", [chat(user("a"), assistant("b")), row])
    with refused(DataError, "mine.jsonl, line 2", *parts):
        load_and_prepare_data(source)


@pytest.mark.parametrize("case", BAD_SHAREGPT.values(), ids=BAD_SHAREGPT)
def test_bad_sharegpt(case, tmp_path, refused):
    turn, *parts = case
    source = write(tmp_path / "mine.jsonl", [{"conversations": [turn]}])
    with refused(DataError, "mine.jsonl, line 1", *parts):
        load_and_prepare_data(source)


def test_prompt_and_completion_lists_hold_messages(tmp_path, refused):
    source = write(tmp_path / "mine.jsonl", [{"prompt": ["hello"], "completion": ["hi"]}])
    with refused(DataError, "mine.jsonl, line 1", "`prompt`", "['hello']"):
        load_and_prepare_data(source)


CAFE = '{"instruction": "café", "response": "b"}'
BAD_FILES = {  # kind -> file name, content, what the message holds
    "missing": ("mine.jsonl", None, "doesn't exist", "looked in"),
    "unknown extension": ("mine.txt", "hello", "mine.txt", "found: .txt", ".parquet"),
    "no extension": ("mine", "hello", "mine", "no extension", ".parquet"),
    "empty JSONL": ("mine.jsonl", "", "has no rows", "empty"),
    "blank JSONL": ("mine.jsonl", "\n\n", "has no rows", "empty"),
    "empty JSON": ("mine.json", "", "not valid JSON", "line 1"),
    "JSON without rows": ("mine.json", "[]", "has no rows", "empty"),
    "CSV without rows": ("mine.csv", "instruction,response\n", "has no rows", "empty"),
    "broken JSON line": (
        "mine.jsonl",
        '{"instruction": "a", "response": "b"}\n\n{"instruction": "c",',
        "line 3 is not valid JSON",
        '{"instruction": "c",',
        "one JSON object on each line",
    ),
    "broken JSON": ("mine.json", "[\n{]", "not valid JSON", "line 2", ".jsonl"),
    "JSON that is no list": ("mine.json", '{"a": 1}', "doesn't hold a list", "dict"),
    "JSON lines named .json": (
        "mine.json",
        '{"instruction": "a", "response": "b"}\n' * 2,
        "not valid JSON",
        "line 2",
        ".jsonl",
    ),
    "JSONL not in UTF-8": ("mine.jsonl", CAFE.encode("latin-1"), "not UTF-8", "byte 20"),
    "JSON not in UTF-8": ("mine.json", f"[{CAFE}]".encode("latin-1"), "not UTF-8", "byte 21"),
    "CSV in UTF-16": (
        "mine.csv",
        "instruction,response\na,b".encode("utf-16"),
        "not UTF-8",
        "byte",
    ),
    "CSV row too long": (
        "mine.csv",
        "instruction,response\na,b\na,b,c\n",
        "line 3",
        "['instruction', 'response']",
        "quotation marks",
    ),
    "CSV row too short": (
        "mine.csv",
        "instruction,response\na\n",
        "line 2",
        "['instruction', 'response']",
        "quotation marks",
    ),
    "CSV with semicolons": (
        "mine.csv",
        "instruction;response\na;b\n",
        "only one column",
        "'instruction;response'",
        "with commas",
    ),
    "CSV with an open quotation mark": (
        "mine.csv",
        'instruction,response\na,"b\n' + "q,a\n" * 9,
        "line",
    ),
    "CSV with a column twice": (
        "mine.csv",
        "instruction,instruction,response\na,b,c\n",
        "`instruction`",
    ),
    "empty CSV field": ("mine.csv", "instruction,response\na,\n", "line 2", "`response`", "''"),
    "parquet that is none": ("mine.parquet", "hello", "mine.parquet"),
    "empty parquet": ("mine.parquet", "", "mine.parquet"),
    "unknown shape": (
        "mine.jsonl",
        [{"text": "hello"}],
        "line 1",
        "columns: text",
        "instruction + response",
    ),
    "fields in other letters": (
        "mine.jsonl",
        [{"Instruction": "a", "Response": "b"}],
        "line 1",
        "columns: Instruction, Response",
        "instruction + response",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(case, tmp_path, refused):
    name, content, *parts = case
    source = write(tmp_path / name, content)
    with refused(DataError, name, *parts):
        load_and_prepare_data(source)


@pytest.mark.parametrize("split, empty", [([9, 1, 1], "validation"), ([1, 1, 1], "validation")])
def test_too_few_rows(split, empty, tmp_path, refused):
    source = write(tmp_path / "mine.jsonl", ROWS[:2])
    with refused(DataError, f"The {empty} split is empty", f"{empty} 0", "`data.split`"):
        load_and_prepare_data(source, DataSettings(split=split))


@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_damaged_parquet(damage, tmp_path, refused):
    path = tmp_path / "mine.parquet"
    Dataset.from_list(ROWS).to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] if damage == "cut short" else whole[:20] + bytes(60) + whole[80:])
    with refused(DataError, "mine.parquet"):
        load_and_prepare_data(str(path))


def test_null_in_parquet(tmp_path, refused):
    path = tmp_path / "mine.parquet"
    Dataset.from_list([*ROWS, {"instruction": "a", "response": None}]).to_parquet(path)
    with refused(DataError, "mine.parquet, row 41", "`response`", "None (NoneType)"):
        load_and_prepare_data(str(path))


@pytest.mark.parametrize("name", ["owner/data", "teknium/OpenHermes-2.5"])
def test_hub_that_cant_be_reached(name, refused):
    with refused(DataError, name, "can't be loaded from the hub", "network"):
        load_and_prepare_data(name)


@pytest.mark.parametrize("key", ["validation_file", "test_file"])
def test_overlap_between_files(key, tmp_path, refused):
    source = write(tmp_path / "train.jsonl", ROWS)
    cfg = DataSettings(**{key: write(tmp_path / "other.jsonl", [*ROWS[:20], {**ROWS[0]}])})
    name = key.removesuffix("_file")
    with refused(DataError, f"train and {name} splits share prompts", "question", f"`data.{key}`"):
        load_and_prepare_data(source, cfg)


def test_a_huge_csv_field_is_read(tmp_path):
    source = write(tmp_path / "mine.csv", f"instruction,response\na,{'b' * 200_000}\n")
    data = load_and_prepare_data(source, DataSettings(split=[1, 0, 0]))
    assert len(data["train"][0]["messages"][1]["content"]) == 200_000


@pytest.mark.parametrize("key", ["validation_file", "test_file"])
def test_missing_second_file(key, tmp_path, refused):
    source = write(tmp_path / "train.jsonl", ROWS)
    with refused(DataError, "nowhere.jsonl", f"`data.{key}`"):
        load_and_prepare_data(source, DataSettings(**{key: str(tmp_path / "nowhere.jsonl")}))


@pytest.mark.parametrize(
    "policy, rows, parts",
    [
        ("drop", ["long " * 50], ["No row of train", "1 rows, 1 longer than 30 tokens"]),
        ("error", ["long " * 50, "short"], ["1 rows of train are longer", "allowed: 30"]),
    ],
    ids=["all rows dropped", "policy error"],
)
def test_over_length(policy, rows, parts, builtin, refused):
    raw = DatasetDict(train=Dataset.from_list([chat(user(row), assistant("b")) for row in rows]))
    with refused(DataError, *parts, "`model.max_length`"):
        prepare_datasets(raw, builtin[1], DataSettings(over_length=policy), max_length=30)


def test_formats_give_the_same_splits(tmp_path):
    rows = [*ROWS, {"instruction": 'comma, "quote"\nand line', "response": "naïve 😀"}]
    write(tmp_path / "mine.jsonl", rows)
    (tmp_path / "mine.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    Dataset.from_list(rows).to_parquet(tmp_path / "mine.parquet")
    with open(tmp_path / "mine.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    splits = [
        {name: split["messages"][:] for name, split in load_and_prepare_data(str(path)).items()}
        for path in sorted(tmp_path.iterdir())
    ]
    assert len(splits) == 4
    assert sum(map(len, splits[0].values())) == len(rows)
    assert all(other == splits[0] for other in splits[1:])


part = st.just(0.0) | st.floats(1e-9, 1e9)


@given(
    prompts=st.lists(st.integers(0, 15), max_size=60),
    parts=st.tuples(st.floats(1e-9, 1e9), part, part).map(list),
    seed=st.integers(0, 2**32 - 1),
)
def test_splits_share_no_prompt_and_lose_no_row(prompts, parts, seed):
    splits = split_by_prompt(prompts, parts, seed)
    sides = [{prompts[row] for row in split} for split in splits]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert sorted(sum(splits, [])) == list(range(len(prompts)))
    assert all(part or not split for part, split in zip(parts, splits))
