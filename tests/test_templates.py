"""What is trained of a conversation, for chat templates of many shapes: not a character more."""

import copy
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from chat_templates import (
    BARE,
    CALLS,
    COMPLETE,
    FAULTS,
    MISTAKEN,
    REASONED,
    REFUSED,
    SHAPES,
    TALK,
    TOOL_SHAPES,
    TOOLS,
    UNFOLLOWED,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from lorabook.data.template import NOTICES, assistant_spans, read_chat, render
from lorabook.data.trace import compile_template
from lorabook.errors import TemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content} | fields


def plain(template, messages, tools=None, **variables):
    "The rendering of transformers, which knows nothing of spans."
    shown = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    variables = TOKENS | variables
    return render_jinja_template([shown], tools, chat_template=template, **variables)[0][0]


def spans_of(template, messages, tools=None):
    "The text and the spans, after a look at what must always be so."
    before = copy.deepcopy((messages, tools))
    text, spans = assistant_spans(template, messages, tools, **TOKENS)
    assert (messages, tools) == before
    assert type(text) is str and text == plain(template, messages, tools)
    borders = [at for span in spans for at in span]
    assert borders == sorted(borders) and all(a < b for a, b in spans)
    return text, spans


def trained(template, messages, tools=None):
    "The texts of the spans."
    text, spans = spans_of(template, messages, tools)
    return [text[a:b] for a, b in spans]


# Cases written out by hand.


@pytest.mark.parametrize("name", SHAPES)
def test_spans_and_notices(name):
    shape = SHAPES[name]
    assert trained(shape.template, shape.chat) == shape.spans
    found = read_chat(shape.template, shape.chat, **TOKENS)
    assert (tuple(found.notices), found.lost) == (shape.notices, [])


@pytest.mark.parametrize("name", SHAPES)
def test_the_span_starts_where_the_generation_prompt_ends(name):
    shape = SHAPES[name]
    prompt = plain(shape.template, shape.chat[:-1], add_generation_prompt=True)
    assert render(shape.template, shape.chat[:-1], None, True, **TOKENS) == prompt
    text, spans = spans_of(shape.template, shape.chat)
    rewritten = {"other prompt", "other history"} & {*shape.notices}
    if "add_generation_prompt" in shape.template and not rewritten:
        assert text[: spans[-1][0]] == prompt


@pytest.mark.parametrize("name", SHAPES)
def test_weight_0_is_context(name):
    shape = SHAPES[name]
    text, spans = spans_of(shape.template, shape.chat)
    answers = [i for i, m in enumerate(shape.chat) if m["role"] == "assistant"]
    for silent in (answers[:1], answers[1:], answers):
        chat = [m | {"weight": int(i not in silent)} for i, m in enumerate(shape.chat)]
        kept = [span for i, span in zip(answers, spans, strict=True) if i not in silent]
        assert spans_of(shape.template, chat) == (text, kept)


def test_one_turn_of_two_messages():
    chat = [user("q"), assistant("one "), assistant("two")]
    assert "".join(trained(SHAPES["grouped"].template, chat)) == "one two<end>"
    assert "".join(trained(SHAPES["merging"].template, chat)) == "one \n\ntwo<end>"


def test_a_prompt_that_opens_a_thought_which_the_answer_holds():
    chat = [user("q"), assistant("<think>\nWell.\n</think>\nA")]
    assert trained(SHAPES["opens a thought"].template, chat) == ["Well.\n</think>\nA<end>"]


def test_an_answer_that_quotes_the_conversation():
    quoted = plain(SHAPES["marks"].template, TALK)
    chat = [user(quoted), assistant(quoted), user(quoted), assistant(quoted)]
    assert trained(SHAPES["marks"].template, chat) == [quoted + "<|over|>"] * 2


# Any conversation. The oracle works with a *twin* of it: all that message 3 says is written in one
# private-use character that only message 3 has, and its white space in one of the Unicode spaces.
# Templates treat both alike, so the plain rendering of the twin tells whose each character is; and
# as the twin quotes no mark of any template, a regular expression finds the answers in it. Nothing
# of the engine is used. What a template looks for in the contents (`</think>`, ends of lines) stays
# in the twin. What a template would rewrite by its value, such as HTML escapes and capitals, is out
# of reach, and so are tools and reasoning: the former have an oracle of their own below, and both
# have cases written by hand.
WORD, SPACE = 0xE000, 0x2000


def twin(messages, keep):
    "The same conversation in characters that tell the number of their message."

    def disguise(text, i):
        pieces = re.split(f"({keep})", text)
        for k in range(0, len(pieces), 2):
            pieces[k] = re.sub(r"\S", chr(WORD + i), re.sub(r"\s", chr(SPACE + i), pieces[k]))
        return "".join(pieces)

    def content(value, i):
        if isinstance(value, str):
            return disguise(value, i)
        return [part | {"text": disguise(part["text"], i)} for part in value]

    return [m | {"content": content(m["content"], i)} for i, m in enumerate(messages)]


def expected(shape, messages):
    "For each character of the text, whether it is to be trained."
    text = plain(shape.template, twin(messages, shape.keep))
    mask = [False] * len(text)
    for match in re.finditer(shape.answer, text, re.DOTALL):
        start, end = match.span(1)
        mask[start:end] = [True] * (end - start)
    for character, train in zip(text, mask):  # the oracle itself is checked
        for base in (WORD, SPACE):
            if base <= ord(character) < base + len(messages):
                assert train == (messages[ord(character) - base]["role"] == "assistant")
    return mask


def quotes(shape):
    "What the template writes around the words of a conversation: look-alikes for other ones."
    messages = [m | {"content": "\ue000"} for m in shape.chat]
    return [piece for piece in plain(shape.template, messages).split("\ue000") if piece]


ODDITIES = ["a", "b", "é", "ß", "🙂", "user", "assistant", " ", "\n", "\n\n", "\t", "\u00a0"]
ODDITIES += ['"', "\\n", "{{ 1 }}", "{% if %}", "{}", "%s", "<b>", "&lt;", "<s>", "</s>"]
ODDITIES += ["<think>\n", "</think>"]


@st.composite
def conversations(draw, shape):
    "A conversation that the template can take."
    marks = quotes(shape)
    content = st.lists(st.sampled_from(ODDITIES + marks), max_size=4).map("".join)
    pool = draw(st.lists(content, min_size=1, max_size=4))  # small, so that messages are repeated
    turns = draw(st.integers(1, 4))
    roles = ["user", "assistant"] * turns
    if shape.free:
        roles = draw(st.lists(st.sampled_from(roles), min_size=1, max_size=2 * turns))
    elif draw(st.booleans()):
        roles.pop()
    roles = ["system"] * (shape.system and draw(st.booleans())) + roles
    messages = [{"role": role, "content": draw(st.sampled_from(pool))} for role in roles]
    if "part.text" in shape.template:
        for m in messages:
            parts = draw(st.lists(content, max_size=3))
            m["content"] = [{"type": "text", "text": part} for part in parts]
    if shape.late:  # an empty answer has a test of its own below
        for m in messages:
            m["content"] = m["content"] if m["content"].strip() else "."
    return messages


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=60)
@given(data=st.data())
def test_any_conversation(name, data):
    shape = SHAPES[name]
    messages = data.draw(conversations(shape))
    text, spans = spans_of(shape.template, messages)
    mask = expected(shape, messages)
    assert len(mask) == len(text)
    found = [any(a <= i < b for a, b in spans) for i in range(len(text))]
    assert found == mask, [text[a:b] for a, b in spans]


MARKS = {  # of the templates that close an answer when they are no longer at it
    "closed by the next": "</s>",
    "closed by the next, last open": "<eot>",
    "one EOS": "</s>",
    "joined": "</assistant>",
    "merging": "<end>",
    "pairs": "</a>",
    "last apart": "<end>",
}


def test_marks_are_of_all_late_templates():
    assert set(MARKS) == {name for name, shape in SHAPES.items() if shape.late}


@pytest.mark.parametrize("name", MARKS)
def test_an_answer_that_ends_like_a_turn(name):
    answer = "a" + MARKS[name]
    chat = [user("q"), assistant(answer), user("q"), assistant(answer)]
    text, spans = spans_of(SHAPES[name].template, chat)
    mask = expected(SHAPES[name], chat)
    assert [any(a <= i < b for a, b in spans) for i in range(len(text))] == mask


@pytest.mark.parametrize("name", MARKS)
def test_an_empty_answer_teaches_nothing_wrong(name):
    shape = SHAPES[name]
    for chat in ([user("q"), assistant("")], [assistant("")], [assistant(""), user("q")]):
        if shape.free or chat[0]["role"] == "user":
            mask = expected(shape, chat)
            assert all(all(mask[a:b]) for a, b in spans_of(shape.template, chat)[1])


@pytest.mark.parametrize("mark", ["<<EOS>>", "|EOS|", "</s><s>"])
def test_one_mark_at_the_end_of_another_make(mark):
    template = SHAPES["one EOS"].template.replace("eos_token", repr(mark))
    assert trained(template, TALK) == [" It is 4.\n", "Sure?" + mark]


def test_a_merged_turn_with_a_mark_of_another_make():
    template = SHAPES["merging"].template.replace("<end>", "~end~")
    assert trained(template, TALK) == [" It is 4.\n~end~", "Sure?~end~"]


def test_a_second_message_of_one_turn_that_quotes_the_heading():
    quote = "<end>\n<assistant>x"
    chat = [user("q"), assistant(quote), assistant(quote)]
    assert "".join(trained(SHAPES["grouped"].template, chat)) == quote + quote + "<end>"


# Tools.


@pytest.mark.parametrize("name", TOOL_SHAPES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_calls_are_trained_and_results_are_not(name, tools):
    shape = TOOL_SHAPES[name]
    assert trained(shape.template, CALLS, tools) == shape.spans
    assert trained(shape.template, CALLS[:4], tools) == shape.spans[:1]  # ends in a result
    assert read_chat(shape.template, CALLS, tools, **TOKENS).lost == []


@pytest.mark.parametrize("name", TOOL_SHAPES)
def test_a_call_of_weight_0_is_context(name):
    shape = TOOL_SHAPES[name]
    chat = [m | {"weight": 0} if m.get("tool_calls") else m for m in CALLS]
    assert trained(shape.template, chat) == shape.spans[2:]


words = st.sampled_from(
    ["a", "é", " ", '"', "<end>", "</call>", "\n", "<assistant>", "<user>", "\\"]
)
texts = st.lists(words, max_size=4).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(st.tuples(texts.map("f".__add__), st.dictionaries(texts, values)), max_size=3)


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, texts, calls, texts), min_size=1, max_size=3))
def test_any_call(rounds):
    "The oracle is the template `own turns` once more, in Python."
    chat, text, answers = [], "<s>", []
    for question, words, made, result in rounds:
        functions = [{"name": name, "arguments": values} for name, values in made]
        tool_calls = [{"id": "1", "type": "function", "function": f} for f in functions]
        chat += [user(question), assistant(words, tool_calls=tool_calls)]
        answer = words
        for name, values in made:
            written = json.dumps(values, indent=1, ensure_ascii=False)
            answer += f"\n<call>{name} {written}</call>"
        text += f"<user>{question}<end>\n<assistant>"
        answers.append((len(text), len(text + answer + "<end>")))
        text += f"{answer}<end>\n"
        if made:
            chat.append({"role": "tool", "tool_call_id": "1", "content": result})
            text += f"<tool>{result}<end>\n"
    assert spans_of(COMPLETE, chat) == (text, answers)


# What is left out, and what is odd.


def test_lost():
    assert read_chat(BARE, CALLS, **TOKENS).lost == [1, 2, 3, 4, 5]
    calls_only = BARE.replace("~ '<end>", "~ (m.tool_calls | default('')) ~ '<end>")
    assert read_chat(calls_only, CALLS, **TOKENS).lost == [2, 3, 5]
    assert read_chat(COMPLETE, CALLS, TOOLS, **TOKENS).lost == []
    questions = BARE.replace("'assistant'", "'tool'")
    assert read_chat(questions, TALK[:3], **TOKENS).lost == [2]


def test_lost_though_others_say_the_same():
    chat = CALLS[:4] + [assistant("It is rain, and sun.")]
    assert read_chat(BARE, chat, **TOKENS).lost == [1, 2, 3]


@pytest.mark.parametrize("notice", NOTICES)
def test_each_notice_has_its_template(notice):
    template, chat = FAULTS[notice]
    tools = TOOLS if notice == "no tools" else None
    assert notice in read_chat(template, chat, tools, **TOKENS).notices


@pytest.mark.parametrize("chat", [TALK, REASONED, CALLS, *(chat for _, chat in FAULTS.values())])
def test_a_complete_template_deserves_no_notice(chat):
    found = read_chat(COMPLETE, chat, TOOLS, **TOKENS)
    assert (found.notices, found.lost) == ([], [])
    found = read_chat(SHAPES["marks"].template, TALK, **TOKENS)
    assert (found.notices, found.lost) == ([], [])


# What is refused.


@pytest.mark.parametrize(
    "name, chat, reason",
    [
        ("no system", TALK, "No system role here."),
        ("alternating", [TALK[0], user("q"), user("r")], "Roles must take turns."),
        ("alternating", [user("q"), user("q")], "Roles must take turns."),
    ],
)
def test_roles_that_a_template_refuses(name, chat, reason, refused):
    roles = ", ".join(m["role"] for m in chat)
    with refused(TemplateError, reason, "roles: " + roles):
        assistant_spans(SHAPES[name].template, chat)
    with refused(TemplateError, reason, "roles: " + roles):
        render(SHAPES[name].template, chat)


def test_the_same_roles_in_an_order_that_it_takes():
    shape = SHAPES["alternating"]
    assert trained(shape.template, TALK[1:]) == shape.spans


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_a_template_that_cannot_be_followed(name, refused):
    with refused(TemplateError, "can't be followed"):
        assistant_spans(UNFOLLOWED[name], [user("a < b"), assistant("b < c")])


@pytest.mark.parametrize("name", REFUSED)
def test_the_sandbox_holds(name, refused):
    chat = copy.deepcopy(TALK)
    for show in (assistant_spans, render):
        with refused(TemplateError, "SecurityError", "unsafe"):
            show(REFUSED[name], chat)
    assert chat == TALK


@pytest.mark.parametrize("name", MISTAKEN)
def test_a_template_with_a_mistake(name, refused):
    mistyped = name in ("open variable", "open loop", "no such filter")
    said = "The chat template is not valid Jinja." if mistyped else "The chat template refuses"
    for show in (assistant_spans, render):
        with refused(TemplateError, said):
            show(MISTAKEN[name], TALK)


# One thing at a time, and many at once.


@pytest.mark.parametrize(
    "name", ["brackets", "closed by the next", "by number", "macros", "merging"]
)
def test_threads_do_not_meet(name):
    template = SHAPES[name].template
    chats = [[user(f"q{i}"), assistant(f"a{i}" * (i % 7 + 1))] * (i % 3 + 1) for i in range(160)]
    interval = sys.getswitchinterval()
    compile_template.cache_clear()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda chat: assistant_spans(template, chat), chats))
    finally:
        sys.setswitchinterval(interval)
    assert together == [assistant_spans(template, chat) for chat in chats]
    assert len(set(map(str, together))) == len(chats)
