"""Chat templates of many shapes, and what is to be trained of a conversation, written out by hand.

The marks are made up. `SHAPES` write conversations of words, in as many ways as templates have;
`TOOL_SHAPES` write calls and results of tools as well. `FAULTS` deserve a notice each, and the last
three groups are refused.
"""

from dataclasses import dataclass, field

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": " It is 4.\n"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Sure?"},
]
THOUGHTS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\nIt is 4."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "<think>\nNo doubt.\n</think>\n\nSure?"},
]
REASONED = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "reasoning_content": "Add.", "content": "It is 4."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Sure?"},
]
PARTS = [
    {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TALK[:-1]
] + [
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "Su"}, {"type": "text", "text": "re?"}],
    }
]


@dataclass(frozen=True)
class Shape:
    "A template, and what is known of it."

    template: str
    answer: str  # a pattern; its group is what to train, in a text in which nobody quotes the marks
    spans: list[str]  # what to train of `chat`, in order
    chat: list[dict] = field(default_factory=lambda: TALK)
    system: bool = True  # it takes a system prompt
    free: bool = True  # it takes questions and answers in any order
    late: bool = False  # it closes an answer when it is no longer at that message
    keep: str = r"(?!)"  # a pattern: what in the contents the template acts upon
    notices: tuple[str, ...] = ()  # for `chat`


SHAPES = {
    # Role in the mark, one mark at the end of each turn.
    "marks": Shape(
        r"""{%- for m in messages -%}
        {{- '<|say:' + m.role + '|>\n' + m.content + '<|over|>\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '<|say:assistant|>\n' }}{%- endif -%}""",
        answer=r"<\|say:assistant\|>\n(.*?<\|over\|>)",
        spans=[" It is 4.\n<|over|>", "Sure?<|over|>"],
    ),
    # Brackets around questions only; the system prompt is part of the first; no generation prompt.
    "brackets": Shape(
        r"""{%- set lead = '' -%}
        {%- if messages[0].role == 'system' -%}
        {%- set lead = '((' + messages[0].content + '))\n' -%}
        {%- set messages = messages[1:] -%}
        {%- endif -%}
        {{- bos_token }}
        {%- for m in messages -%}
        {%- if m.role == 'user' -%}
        {{- '[ASK] ' + (lead if loop.first else '') + m.content + ' [/ASK]' }}
        {%- else -%}
        {{- ' ' + m.content + eos_token }}
        {%- endif -%}
        {%- endfor -%}""",
        answer=r"\[/ASK\](.*?</s>)",
        spans=["  It is 4.\n</s>", " Sure?</s>"],
        free=False,
    ),
    # Contents are stripped; the heading is made of a role in capitals.
    "trimmed": Shape(
        r"""{%- for m in messages -%}
        ### {{ m.role | capitalize }}:{{ '\n' }}{{ m.content | trim }}{{ '<stop>\n\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}### Assistant:{{ '\n' }}{%- endif -%}""",
        answer=r"### Assistant:\n(.*?<stop>)",
        spans=["It is 4.<stop>", "Sure?<stop>"],
    ),
    # Thoughts are stripped from all turns but the last.
    "forgets thoughts": Shape(
        r"""{%- for m in messages -%}
        {{- '<|' ~ m.role ~ '|>' }}
        {%- if m.role == 'assistant' and not loop.last -%}
        {{- m.content.split('</think>')[-1].lstrip('\n') }}
        {%- else -%}
        {{- m.content }}
        {%- endif -%}
        {{- '<|end|>' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '<|assistant|>' }}{%- endif -%}""",
        answer=r"<\|assistant\|>(.*?<\|end\|>)",
        spans=["It is 4.<|end|>", "<think>\nNo doubt.\n</think>\n\nSure?<|end|>"],
        chat=THOUGHTS,
        keep=r"</think>|\n",
        notices=("cut",),
    ),
    # Reasoning has a field of its own, and is written in front of the answer.
    "writes reasoning": Shape(
        r"""{%- for m in messages -%}
        {{- '<|' ~ m.role ~ '|>\n' }}
        {%- if m.reasoning_content -%}
        {{- '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' }}
        {%- endif -%}
        {{- m.content ~ '<|end|>\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '<|assistant|>\n' }}{%- endif -%}""",
        answer=r"<\|assistant\|>\n(.*?<\|end\|>)",
        spans=["<think>\nAdd.\n</think>\n\nIt is 4.<|end|>", "Sure?<|end|>"],
        chat=REASONED,
    ),
    # The generation prompt opens a thought that is not in the turns.
    "opens a thought": Shape(
        r"""{%- for m in messages -%}
        {{- '<' ~ m.role ~ '>\n' ~ m.content ~ '<end>\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '<assistant>\n<think>\n' }}{%- endif -%}""",
        answer=r"<assistant>\n(?:<think>\n)?(.*?<end>)",
        spans=[" It is 4.\n<end>", "Sure?<end>"],
        keep=r"<think>\n",
        notices=("other prompt",),
    ),
    # All system prompts are collected, and come first.
    "system first": Shape(
        r"""{%- set rules = messages | selectattr('role', 'equalto', 'system') | list -%}
        {%- if rules -%}
        {{- '{rules}' ~ (rules | map(attribute='content') | join(' ')) ~ '{/rules}\n' }}
        {%- endif -%}
        {%- for m in messages | rejectattr('role', 'equalto', 'system') -%}
        {{- '{' ~ m.role ~ '}' ~ m.content ~ '{/' ~ m.role ~ '}\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '{assistant}' }}{%- endif -%}""",
        answer=r"\{assistant\}(.*?\{/assistant\})",
        spans=[" It is 4.\n{/assistant}", "Sure?{/assistant}"],
    ),
    # The system prompt comes last, so a shorter conversation is not the beginning of a longer one.
    "system last": Shape(
        r"""{%- for m in messages if m.role != 'system' -%}
        {{- '<' ~ m.role ~ '>' ~ m.content ~ '</' ~ m.role ~ '>' }}
        {%- endfor -%}
        {%- for m in messages if m.role == 'system' -%}
        {{- '<note>' ~ m.content ~ '</note>' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}<assistant>{%- endif -%}""",
        answer=r"<assistant>(.*?</assistant>)",
        spans=[" It is 4.\n</assistant>", "Sure?</assistant>"],
        notices=("other history",),
    ),
    # Roles have to alternate.
    "alternating": Shape(
        r"""{%- if messages[0].role == 'system' -%}
        {{- '<rules>' ~ messages[0].content ~ '</rules>' }}
        {%- set messages = messages[1:] -%}
        {%- endif -%}
        {%- for m in messages -%}
        {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must take turns.') }}
        {%- endif -%}
        {{- '<turn of=' ~ m.role ~ '>\n' ~ m.content ~ '</turn>\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '<turn of=assistant>\n' }}{%- endif -%}""",
        answer=r"<turn of=assistant>\n(.*?</turn>)",
        spans=[" It is 4.\n</turn>", "Sure?</turn>"],
        free=False,
    ),
    # There is no system role; the assistant has another name.
    "no system": Shape(
        r"""{%- for m in messages -%}
        {%- if m.role == 'system' -%}{{- raise_exception('No system role here.') }}{%- endif -%}
        {%- set who = 'model' if m.role == 'assistant' else m.role -%}
        {{- '<open>' ~ who ~ '\n' ~ (m.content | trim) ~ '<close>\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '<open>model\n' }}{%- endif -%}""",
        answer=r"<open>model\n(.*?<close>)",
        spans=["It is 4.<close>", "Sure?<close>"],
        chat=TALK[1:],
        system=False,
    ),
    # An answer is closed by the message after it, or by the end.
    "closed by the next": Shape(
        r"""{%- set ns = namespace(last='') -%}
        {%- for m in messages -%}
        {%- if ns.last == 'assistant' -%}{{- eos_token ~ '\n' }}{%- endif -%}
        {{- '<' ~ m.role ~ '>' ~ m.content }}
        {%- set ns.last = m.role -%}
        {%- endfor -%}
        {%- if ns.last == 'assistant' -%}{{- eos_token }}{%- endif -%}
        {%- if add_generation_prompt -%}<assistant>{%- endif -%}""",
        answer=r"<assistant>(.*?</s>)",
        spans=[" It is 4.\n</s>", "Sure?</s>"],
        late=True,
    ),
    # Every turn is closed by the one after it; the last one stays open.
    "closed by the next, last open": Shape(
        r"""{%- for m in messages -%}
        {%- if not loop.first -%}<eot>{{- '\n' }}{%- endif -%}
        {{- '<' ~ m.role ~ '>\n' ~ m.content }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}<eot>{{- '\n<assistant>\n' }}{%- endif -%}""",
        answer=r"<assistant>\n(.*?(?:<eot>|\Z))",
        spans=[" It is 4.\n<eot>", "Sure?"],
        late=True,
        notices=("no last end",),
    ),
    # One EOS, at the end of the text.
    "one EOS": Shape(
        r"""{{- bos_token }}
        {%- for m in messages -%}
        {{- '\n[' ~ m.role ~ '] ' ~ m.content }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '\n[assistant] ' }}
        {%- elif messages[-1].role == 'assistant' -%}{{- eos_token }}{%- endif -%}""",
        answer=r"\[assistant\] (.*?(?:</s>|(?=\n\[)))",
        spans=[" It is 4.\n", "Sure?</s>"],
        late=True,
        notices=("no middle end",),
    ),
    # No end of turn at all, only white space.
    "no end": Shape(
        r"""{%- for m in messages -%}
        {{- m.role ~ '> ' ~ m.content ~ '\n\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- 'assistant> ' }}{%- endif -%}""",
        answer=r"assistant> (.*?)(?=\n\n)",
        spans=[" It is 4.\n", "Sure?"],
        notices=("no end",),
    ),
    # A loop over numbers, with a line between the turns.
    "by number": Shape(
        r"""{%- for i in range(messages | length) -%}
        {%- if i -%}{{- '\n---\n' }}{%- endif -%}
        {%- set m = messages[i] -%}
        {{- '<<' ~ m['role'] ~ '>>' ~ m['content'] ~ '<<end>>' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}
        {{- ('\n---\n' if messages else '') ~ '<<assistant>>' }}
        {%- endif -%}""",
        answer=r"<<assistant>>(.*?<<end>>)",
        spans=[" It is 4.\n<<end>>", "Sure?<<end>>"],
    ),
    # A loop over numbers that looks at the message before.
    "by number, looking back": Shape(
        r"""{%- for i in range(messages | length) -%}
        {%- if i and messages[i - 1].role != messages[i].role -%}{{- '---\n' }}{%- endif -%}
        {{- '<' ~ messages[i].role ~ '>' ~ messages[i].content ~ '<end>\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}---{{- '\n<assistant>' }}{%- endif -%}""",
        answer=r"<assistant>(.*?<end>)",
        spans=[" It is 4.\n<end>", "Sure?<end>"],
    ),
    # Everything is written by macros.
    "macros": Shape(
        r"""{%- macro words(m) -%}{{- m.content }}{%- endmacro -%}
        {%- macro turn(role, text) -%}{{- '|' ~ role ~ '|' }}{{- text }}|/|{%- endmacro -%}
        {%- macro wrapped(m) -%}{%- call plain() -%}{{- words(m) }}{%- endcall -%}{%- endmacro -%}
        {%- macro plain() -%}{{- caller() }}{%- endmacro -%}
        {%- for m in messages -%}{{- turn(m.role, wrapped(m)) }}{{- '\n' }}{%- endfor -%}
        {%- if add_generation_prompt -%}|assistant|{%- endif -%}""",
        answer=r"\|assistant\|(.*?\|/\|)",
        spans=[" It is 4.\n|/|", "Sure?|/|"],
    ),
    # What is written is first captured.
    "captured": Shape(
        r"""{%- for m in messages -%}
        {%- set head %}<{{ m.role }}>{% endset -%}
        {%- set body -%}{%- filter trim -%}{{- m.content }}{%- endfilter -%}{%- endset -%}
        {%- set all = head ~ body ~ '<done>' -%}
        {{- all ~ '\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}<assistant>{%- endif -%}""",
        answer=r"<assistant>(.*?<done>)",
        spans=["It is 4.<done>", "Sure?<done>"],
    ),
    # All text is collected in a variable, and written at the end.
    "collected": Shape(
        r"""{%- set ns = namespace(text=bos_token) -%}
        {%- for m in messages -%}
        {%- set ns.text = ns.text ~ '<' ~ m.role ~ '> ' ~ m.content ~ ' <end>' -%}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{%- set ns.text = ns.text ~ '<assistant>' -%}{%- endif -%}
        {{- ns.text }}""",
        answer=r"<assistant>(.*?<end>)",
        spans=["  It is 4.\n <end>", " Sure? <end>"],
    ),
    # All turns are collected in a list, and joined.
    "joined": Shape(
        r"""{%- set ns = namespace(turns=[]) -%}
        {%- for m in messages -%}
        {%- set ns.turns = ns.turns + ['<' + m.role + '>' + m.content + '</' + m.role + '>'] -%}
        {%- endfor -%}
        {{- ns.turns | join('\n') }}
        {%- if add_generation_prompt -%}{{- '\n<assistant>' }}{%- endif -%}""",
        answer=r"<assistant>(.*?</assistant>)",
        spans=[" It is 4.\n</assistant>", "Sure?</assistant>"],
        late=True,
    ),
    # Marks of transformers around what the assistant writes; they are not asked.
    "generation marks": Shape(
        r"""{%- for m in messages -%}
        {%- if m.role == 'assistant' -%}
        <bot>{%- generation -%}{{- m.content }}<end>{%- endgeneration -%}
        {%- else -%}
        <{{ m.role }}>{{ m.content }}<end>
        {%- endif -%}
        {%- endfor -%}
        {%- if add_generation_prompt -%}<bot>{%- endif -%}""",
        answer=r"<bot>(.*?<end>)",
        spans=[" It is 4.\n<end>", "Sure?<end>"],
    ),
    # Contents are lists of parts, or text.
    "parts": Shape(
        r"""{%- for m in messages -%}
        {{- '<' ~ m.role ~ '>\n' }}
        {%- if m.content is string -%}{{- m.content }}
        {%- else -%}
        {%- for part in m.content -%}
        {%- if part.type == 'text' -%}{{- part.text }}{%- else -%}<picture>{%- endif -%}
        {%- endfor -%}
        {%- endif -%}
        {{- '<end>\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '<assistant>\n' }}{%- endif -%}""",
        answer=r"<assistant>\n(.*?<end>)",
        spans=[" It is 4.\n<end>", "Sure?<end>"],
        chat=PARTS,
    ),
    # Messages of one role in a row become one turn, which is written when the next one begins.
    "merging": Shape(
        r"""{%- set ns = namespace(role='', text='') -%}
        {%- for m in messages -%}
        {%- if m.role == ns.role -%}
        {%- set ns.text = ns.text ~ '\n\n' ~ m.content -%}
        {%- else -%}
        {%- if ns.role -%}{{- '<' ~ ns.role ~ '>' ~ ns.text ~ '<end>' }}{%- endif -%}
        {%- set ns.role = m.role -%}
        {%- set ns.text = m.content -%}
        {%- endif -%}
        {%- endfor -%}
        {{- '<' ~ ns.role ~ '>' ~ ns.text ~ '<end>' }}
        {%- if add_generation_prompt -%}<assistant>{%- endif -%}""",
        answer=r"<assistant>(.*?<end>)",
        spans=[" It is 4.\n<end>", "Sure?<end>"],
        late=True,
    ),
    # No generation prompt, though turns have headings.
    "no prompt": Shape(
        r"""{%- for m in messages -%}
        {{- '<' ~ m.role ~ '>\n' ~ m.content ~ eos_token ~ '\n' }}
        {%- endfor -%}""",
        answer=r"<assistant>\n(.*?</s>)",
        spans=[" It is 4.\n</s>", "Sure?</s>"],
    ),
    # The heading comes with the turn, and the generation prompt has no space at its end.
    "short prompt": Shape(
        r"""{%- for m in messages -%}
        {{- m.role | upper }}: {{ m.content }} ¶{{ '\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}""",
        answer=r"ASSISTANT:(.*?¶)",
        spans=["  It is 4.\n ¶", " Sure? ¶"],
    ),
    # Text is put together by filters and methods.
    "filters": Shape(
        r"""{%- for m in messages -%}
        {%- if m.role == 'system' -%}
        {{- '<%s>%s<end>' % (m.role, m.content) }}
        {%- elif m.role == 'user' -%}
        {{- '<{}>{}<end>'.format(m.role, m.content) }}
        {%- else -%}
        {{- ['<' ~ m.role ~ '>', m.content | indent(2), '<end>'] | join }}
        {%- endif -%}
        {%- endfor -%}
        {%- if add_generation_prompt -%}<assistant>{%- endif -%}""",
        answer=r"<assistant>(.*?<end>)",
        spans=[" It is 4.\n<end>", "Sure?<end>"],
        keep=r"\n",
    ),
    # The answer is written by `format`, so that nothing is known of its characters.
    "formatted": Shape(
        r"""{%- for m in messages -%}
        {{- '<%s>%s<end>\n' | format(m.role, m.content) }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}<assistant>{%- endif -%}""",
        answer=r"<assistant>(.*?<end>)",
        spans=[" It is 4.\n<end>", "Sure?<end>"],
    ),
    # Questions and answers are taken in pairs.
    "pairs": Shape(
        r"""{%- if messages[0].role == 'system' -%}
        {{- '<rules>' ~ messages[0].content ~ '</rules>' }}
        {%- set messages = messages[1:] -%}
        {%- endif -%}
        {%- for pair in messages | batch(2) -%}
        {{- '<q>' ~ (pair[0].content | trim) ~ '</q>' }}
        {%- if pair[1] -%}{{- '<a>' ~ (pair[1].content | trim) ~ '</a>' }}{%- endif -%}
        {%- endfor -%}
        {%- if add_generation_prompt -%}<a>{%- endif -%}""",
        answer=r"<a>(.*?</a>)",
        spans=["It is 4.</a>", "Sure?</a>"],
        late=True,
        free=False,
    ),
    # The last message is written after the loop.
    "last apart": Shape(
        r"""{%- for m in messages[:-1] -%}
        {{- '<' ~ m.role ~ '>' ~ m.content ~ '<end>' }}
        {%- endfor -%}
        {%- set m = messages[-1] -%}
        {{- '<' ~ m.role ~ '>' ~ m.content.strip() ~ '<end>' }}
        {%- if add_generation_prompt -%}<assistant>{%- endif -%}""",
        answer=r"<assistant>(.*?<end>)",
        spans=[" It is 4.\n<end>", "Sure?<end>"],
        late=True,
    ),
    # A heading and a mark for all messages of one role in a row.
    "grouped": Shape(
        r"""{%- for m in messages -%}
        {%- if loop.first or loop.previtem.role != m.role -%}{{- '<' ~ m.role ~ '>' }}{%- endif -%}
        {{- m.content }}
        {%- if loop.last or loop.nextitem.role != m.role -%}{{- '<end>\n' }}{%- endif -%}
        {%- endfor -%}
        {%- if add_generation_prompt -%}<assistant>{%- endif -%}""",
        answer=r"<assistant>(.*?<end>)",
        spans=[" It is 4.\n<end>", "Sure?<end>"],
        free=False,
    ),
    # A default system prompt, turns that are put into a variable first, and an EOS after all.
    "embellished": Shape(
        r"""{%- for m in messages -%}
        {%- set turn = '<h>' + m['role'] + '</h>\n\n' + m['content'] | trim + '<eot>' -%}
        {%- if loop.first and m.role != 'system' -%}
        {%- set turn = '<h>system</h>\n\nBe good.<eot>' + turn -%}
        {%- endif -%}
        {%- if loop.index0 == 0 -%}{%- set turn = bos_token + turn -%}{%- endif -%}
        {{- turn }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '<h>assistant</h>\n\n' }}
        {%- else -%}{{- eos_token }}{%- endif -%}""",
        answer=r"<h>assistant</h>\n\n(.*?<eot>)",
        spans=["It is 4.<eot>", "Sure?<eot>"],
        chat=TALK[1:],
    ),
}


def call(name, number, **arguments):
    "A call of a tool."
    function = {"name": name, "arguments": arguments}
    return {"id": f"c{number}", "type": "function", "function": function}


CALLS = [  # two calls at once, their results, a call beside words, a result, an answer
    {"role": "user", "content": "Weather in Oslo and Rome?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            call("weather", 1, place={"city": "Oslo", "tags": ["a<b", 1, None]}),
            call("weather", 2, place={"city": "Rome"}),
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "tool", "tool_call_id": "c2", "content": "sun"},
    {"role": "assistant", "content": "And now?", "tool_calls": [call("clock", 3)]},
    {"role": "tool", "tool_call_id": "c3", "content": "noon"},
    {"role": "assistant", "content": "Wet, dry, midday."},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "<end>", "parameters": {"type": "object"}},
    }
    for name in ("weather", "clock")
]


@dataclass(frozen=True)
class ToolShape:
    "A template that knows tools."

    template: str
    spans: list[str]  # what to train of `CALLS`, in order


COMPLETE = r"""{{- bos_token }}
{%- if tools -%}{{- '<tools>' ~ (tools | tojson(indent=2)) ~ '</tools>\n' }}{%- endif -%}
{%- for m in messages -%}
{{- '<' ~ m.role ~ '>' }}
{%- if m.reasoning_content -%}<think>{{- m.reasoning_content }}</think>{%- endif -%}
{{- m.content }}
{%- for c in m.tool_calls or [] -%}
{{- '\n<call>' ~ c.function.name ~ ' ' ~ (c.function.arguments | tojson(indent=1)) ~ '</call>' }}
{%- endfor -%}
{{- '<end>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""

TOOL_SHAPES = {
    # A result is a turn like others.
    "own turns": ToolShape(
        COMPLETE,
        spans=[
            '\n<call>weather {\n "place": {\n  "city": "Oslo",\n  "tags": [\n   "a<b",\n   1,\n'
            '   null\n  ]\n }\n}</call>\n<call>weather {\n "place": {\n  "city": "Rome"\n }\n}'
            "</call><end>",
            "And now?\n<call>clock {}</call><end>",
            "Wet, dry, midday.<end>",
        ],
    ),
    # All calls are one list; results in a row are one question.
    "results in a question": ToolShape(
        r"""{%- for m in messages -%}
        {%- if m.role == 'tool' -%}
        {%- if loop.previtem.role != 'tool' -%}<user>{%- endif -%}
        {{- '\n<result>' ~ m.content ~ '</result>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<end>\n' }}{%- endif -%}
        {%- else -%}
        {{- '<' ~ m.role ~ '>' ~ m.content }}
        {%- if m.tool_calls -%}
        {{- '<calls>' ~ (m.tool_calls | map(attribute='function') | list | tojson) ~ '</calls>' }}
        {%- endif -%}
        {{- '<end>\n' }}
        {%- endif -%}
        {%- endfor -%}
        {%- if add_generation_prompt -%}<assistant>{%- endif -%}""",
        spans=[
            '<calls>[{"name": "weather", "arguments": {"place": {"city": "Oslo", '
            '"tags": ["a<b", 1, null]}}}, '
            '{"name": "weather", "arguments": {"place": {"city": "Rome"}}}]</calls><end>',
            'And now?<calls>[{"name": "clock", "arguments": {}}]</calls><end>',
            "Wet, dry, midday.<end>",
        ],
    ),
    # Calls, results and the answer follow each other without headings.
    "brackets": ToolShape(
        r"""{%- for m in messages -%}
        {%- if m.role == 'user' -%}{{- '[Q]' ~ m.content ~ '[/Q]' }}
        {%- elif m.role == 'tool' -%}{{- '[R]' ~ m.content ~ '[/R]' }}
        {%- elif m.tool_calls -%}{{- m.content ~ '[C]' }}
        {%- for c in m.tool_calls -%}
        {{- c.function.name ~ '(' }}
        {%- for key, value in c.function.arguments.items() -%}
        {{- key ~ '=' ~ (value | tojson) }}
        {%- endfor -%}
        {{- ');' }}
        {%- endfor -%}
        {{- '[/C]' }}
        {%- else -%}{{- m.content ~ eos_token }}{%- endif -%}
        {%- endfor -%}""",
        spans=[
            '[C]weather(place={"city": "Oslo", "tags": ["a<b", 1, null]});'
            'weather(place={"city": "Rome"});[/C]',
            "And now?[C]clock();[/C]",
            "Wet, dry, midday.</s>",
        ],
    ),
    # A result repeats the name in the call, which is then not the assistant's.
    "named results": ToolShape(
        r"""{%- set ns = namespace(calls=[]) -%}
        {%- for m in messages -%}
        {%- if m.role == 'tool' -%}
        {%- for c in ns.calls if c.id == m.tool_call_id -%}
        {{- '<from ' ~ c.function.name ~ '>' ~ m.content ~ '</from>\n' }}
        {%- endfor -%}
        {%- else -%}
        {%- if m.tool_calls -%}{%- set ns.calls = m.tool_calls -%}{%- endif -%}
        {{- '<' ~ m.role ~ '>\n' ~ m.content }}
        {%- for c in m.tool_calls or [] -%}
        {{- '{"call": "' ~ c.function.name ~ '", "with": ' }}
        {{- c.function.arguments | tojson ~ '}\n' }}
        {%- endfor -%}
        {{- '<end>\n' }}
        {%- endif -%}
        {%- endfor -%}
        {%- if add_generation_prompt -%}{{- '<assistant>\n' }}{%- endif -%}""",
        spans=[
            '{"call": "weather", "with": {"place": {"city": "Oslo", "tags": ["a<b", 1, null]}}}\n'
            '{"call": "weather", "with": {"place": {"city": "Rome"}}}\n<end>',
            'And now?{"call": "clock", "with": {}}\n<end>',
            "Wet, dry, midday.<end>",
        ],
    ),
    # A loop over numbers that looks back for a result.
    "by number, looking back": ToolShape(
        r"""{%- for i in range(messages | length) -%}
        {%- if i and messages[i - 1].role == 'tool' and messages[i].role != 'tool' -%}
        {{- '<thanks>' }}
        {%- endif -%}
        {{- '<' ~ messages[i].role ~ '>' ~ messages[i].content }}
        {%- for c in messages[i].tool_calls or [] -%}
        {{- '<call>' ~ c.function.name ~ ' ' ~ (c.function.arguments | tojson) ~ '</call>' }}
        {%- endfor -%}
        {{- '<end>\n' }}
        {%- endfor -%}
        {%- if add_generation_prompt -%}<assistant>{%- endif -%}""",
        spans=[
            '<call>weather {"place": {"city": "Oslo", "tags": ["a<b", 1, null]}}</call>'
            '<call>weather {"place": {"city": "Rome"}}</call><end>',
            "And now?<call>clock {}</call><end>",
            "Wet, dry, midday.<end>",
        ],
    ),
}

BARE = """{%- for m in messages if m.role in ('user', 'assistant') -%}
{{- '<' ~ m.role ~ '>' ~ m.content ~ '<end>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""

FAULTS = {  # notice -> a template and a conversation that call for it
    "no end": (SHAPES["no end"].template, TALK),
    "no middle end": (SHAPES["one EOS"].template, TALK),
    "no last end": (SHAPES["closed by the next, last open"].template, TALK),
    "other prompt": (SHAPES["opens a thought"].template, TALK),
    "other history": (SHAPES["system last"].template, TALK),
    "cut": (SHAPES["forgets thoughts"].template, THOUGHTS),
    "no reasoning": (BARE, REASONED),
    "no system": (BARE, TALK),
    "cut prompt": (SHAPES["no end"].template.replace("m.content", "m.content[:5]"), TALK),
    "no tools": (BARE, TALK[1:]),
    "two bos": ("{{- bos_token }}" + COMPLETE, TALK),
}

TURN = "{%% for m in messages %%}<{{ m.role }}>%s<end>{%% endfor %%}"
UNFOLLOWED = {  # templates whose text depends on more than the values that they are given
    "chance": "{{ range(10**5) | random }}" + TURN % "{{ m.content }}",
    "escaped by addition": TURN % "{{ m.content + ('&' | escape) }}",
    "an address": TURN % "{{ m.content.upper }}",
}
REFUSED = {  # templates that the sandbox stops
    "class": "{{ ''.__class__.__mro__ }}",
    "class of words": TURN % "{{ m.content.__class__.__mro__ }}",
    "class in a format": TURN % "{{ '{0.__class__.__mro__}'.format(m.content) }}",
    "class in their format": TURN % "{{ (m.content ~ '{0.__class__.__mro__}').format(m.content) }}",
    "append": "{% set _ = messages.append(messages[0]) %}" + TURN % "{{ m.content }}",
    "update": TURN % "{{ m.update({'content': 'x'}) }}{{ m.content }}",
}
MISTAKEN = {  # templates with mistakes
    "open variable": "{% for m in messages %}{{ m.content }",
    "open loop": "{% for m in messages %}{{ m.content }}",
    "no such filter": TURN % "{{ m.content | whisper }}",
    "no such function": TURN % "{{ whisper(m.content) }}",
    "wrong type": TURN % "{{ m.content + 1 }}",
    "division by zero": TURN % "{{ m.content }}{{ 1 // 0 }}",
    "a huge range": "{% for i in range(10 ** 6) %}{% endfor %}" + TURN % "{{ m.content }}",
    "no end of calls": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}
