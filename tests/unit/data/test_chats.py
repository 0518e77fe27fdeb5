"""What a chat template writes, and which parts of it are learned."""

from __future__ import annotations

from datetime import datetime

import pytest

from colm_scale.data.chats import ChatTemplate, RenderedChat
from colm_scale.data.messages import read_messages
from colm_scale.data.readers import Row
from colm_scale.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for t in m.tool_calls or [] %}"
    "<call>{{ t.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "lookup", "arguments": '{"city": "Oslo"}'}}
NOW = datetime(2026, 11, 29, 12, 30)


def said(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


TWO_TURNS = [said("user", "2+2?"), said("assistant", "4"), said("user", "3+3?"), said("assistant", "6")]


def rendered(template: str, messages: list[dict[str, object]], *tools: dict[str, object]) -> RenderedChat:
    row = Row(0, "s", read_messages(messages, "messages", "a.jsonl line 1"), "", "", "a.jsonl line 1", tools=tools)
    return ChatTemplate(template, {"eos_token": "</s>"}, NOW).render(row)


def learned(template: str, messages: list[dict[str, object]], *tools: dict[str, object]) -> list[str]:
    chat = rendered(template, messages, *tools)
    assert not chat.left_out
    return [chat.text[begin:end] for begin, end in chat.learned]


def refused(template: str, messages: list[dict[str, object]]) -> str:
    with pytest.raises(UserError) as caught:
        rendered(template, messages)
    return str(caught.value)


def test_calls_of_tools_are_learned_with_the_text_and_the_end_of_the_turn():
    messages = [
        said("user", "Oslo?"),
        said("assistant", "Let me look.", tool_calls=[CALL]),
        said("tool", "3 C", name="lookup", tool_call_id="c1"),
        said("assistant", "It is 3 C."),
    ]
    assert learned(CHATML, messages) == [
        'Let me look.<call>{"name": "lookup", "arguments": {"city": "Oslo"}}</call><|im_end|>\n',
        "It is 3 C.<|im_end|>\n",
    ]
    messages[1]["content"] = None
    assert learned(CHATML, messages)[0].startswith('<call>{"name": "lookup"')


def test_the_template_is_told_of_the_tools():
    template = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}" + CHATML
    assert rendered(template, TWO_TURNS, {"name": "lookup"}).text.startswith("[lookup]<|im_start|>user")
    assert rendered(template, TWO_TURNS).text.startswith("<|im_start|>user")


def test_a_turn_that_the_row_excludes_is_not_learned():
    messages = [said("user", "2+2?"), said("assistant", "5", weight=0, train=False), said("assistant", "4", weight=1)]
    assert learned(CHATML, messages) == ["4<|im_end|>\n"]


def test_an_end_of_text_that_only_the_whole_chat_has_is_learned_with_the_last_turn():
    template = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    assert learned(template, TWO_TURNS) == ["4<|im_end|>\n", "6<|im_end|>\n</s>"]


def test_generation_marks_decide():
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}",
    )
    assert learned(template, TWO_TURNS) == ["4!", "6!"]
    only_last = template.replace("{% if m.role == 'assistant' %}", "{% if loop.last %}")
    assert "but none around message 2 of 4" in refused(only_last, TWO_TURNS)


@pytest.mark.parametrize(
    "loop",
    [
        "{% for i in range(messages | length) %}{% set m = messages[i] %}",  # marks no message
        "{% macro show(m) %}{{ m.role }}{% endmacro %}{% for m in messages %}",
        "{% for m in messages %}{% endfor %}{% for m in messages[0:] %}",
    ],
)
def test_turns_are_found_however_a_template_walks_through_the_messages(loop):
    assert learned(CHATML.replace("{% for m in messages %}", loop), TWO_TURNS) == ["4<|im_end|>\n", "6<|im_end|>\n"]


def test_a_system_message_that_a_template_adds_is_not_learned():
    template = CHATML.replace("<|im_start|>{{", "{% if loop.first %}<|system|>be kind{% endif %}<|im_start|>{{")
    assert learned(template, [said("assistant", "hi"), *TWO_TURNS])[0] == "hi<|im_end|>\n"


def test_a_prompt_that_depends_on_the_role_before_it():
    template = (
        "{% for m in messages %}{% if loop.first or loop.previtem.role != 'tool' %}<{{ m.role }}>{% endif %}"
        "{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}<assistant>{% endif %}"
    )
    messages = [said("user", "a"), said("assistant", "b."), said("tool", "c"), said("assistant", "d.")]
    assert learned(template, messages) == ["b.", "d."]


def test_a_prompt_that_opens_a_thought_which_the_turn_lacks_is_the_reason():
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert 'the generation prompt ends in "<think>\\n", but' in refused(template, TWO_TURNS)


@pytest.mark.parametrize(
    ("message", "key"),
    [
        (said("assistant", "4", reasoning_content="two and two"), "messages[1].reasoning_content"),
        (said("assistant", "4", thinking="two and two"), "messages[1].reasoning_content"),
        (said("assistant", "4", mood="glad"), "messages[1].mood"),
    ],
)
def test_what_the_template_does_not_write_is_named(message, key):
    assert rendered(CHATML, [said("user", "2+2?"), message]).left_out == (key,)


def test_a_thought_that_the_template_cuts_is_left_out_and_one_that_it_moves_is_not():
    messages = [said("user", "2+2?"), said("assistant", "<think>two and two</think>4")]
    cutting = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    assert rendered(cutting, messages).left_out == ("messages[1].content",)
    moving = CHATML.replace("{{ m.content }}", "{{ m.content | replace('<think>', '<think>\n') }}")
    assert rendered(moving, messages).left_out == ()


def test_calls_that_a_template_does_not_write_are_left_out():
    messages = [said("user", "Oslo?"), said("assistant", "", tool_calls=[CALL])]
    plain = CHATML.replace("m.tool_calls or []", "[]")
    assert rendered(plain, messages).left_out == ("messages[1].tool_calls",)


@pytest.mark.parametrize("content", [None, "", "Let me look."])
@pytest.mark.parametrize(
    "said",
    [
        "{{ m.content or '' }}{{ '[' + c.function.arguments + ']' }}",
        "{{ m.content or '' }}[{{ c.function.arguments }}]",
        "{{ m.content or '' }}[{{ c.function.arguments | tojson }}]",
        "{% if m.content is none %}{{ '[' + c.function.arguments + ']' }}{% else %}{{ m.content }}"
        "{% if m.content %}[{{ c.function.arguments }}]{% endif %}{% endif %}",
    ],
    ids=["joined", "written", "as JSON", "only without a content"],
)
def test_arguments_of_calls_are_json_however_a_template_reads_them(said, content):
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}"
        f"{said}{{% endfor %}}{{% else %}}{{{{ m.content }}}}{{% endif %}}<end>{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    call = {"function": {"name": "lookup", "arguments": {"city": "Tromsø", "near": None}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content, "tool_calls": [call]}]
    assert learned(template, messages) == [f'lookup{content or ""}[{{"city": "Tromsø", "near": null}}]<end>']


def test_an_answer_of_a_tool_inside_the_assistants_turn_is_refused():
    template = (
        "{% for m in messages %}{% if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{% if loop.nextitem is defined "
        "and loop.nextitem.role == 'tool' %}[{{ loop.nextitem.content }}]{% endif %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [said("user", "a"), said("assistant", "b"), said("tool", "three degrees"), said("assistant", "c")]
    assert "message 3 of 4, of the role tool, inside message 2" in refused(template, messages)


def test_a_content_of_parts_is_given_as_the_template_reads_it():
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "four"}]
    assert learned(CHATML, [said("user", "2+2?"), said("assistant", parts)]) == ["4\nfour<|im_end|>\n"]
    looping = CHATML.replace("{{ m.content }}", "{% for p in m['content'] %}({{ p.text }}){% endfor %}")
    assert learned(looping, [said("user", "2+2?"), said("assistant", parts)]) == ["(4)(four)<|im_end|>\n"]
    assert learned(looping, TWO_TURNS)[0] == "(4)<|im_end|>\n"


def test_a_date_in_a_template_is_the_one_given():
    assert rendered("{{ strftime_now('%d %b %Y %H:%M') }}" + CHATML, TWO_TURNS).text.startswith("29 Nov 2026 12:30")


def test_texts_that_look_like_marks_change_nothing():
    messages = [said("user", "2+2?"), said("assistant", "a \ufdd01\ufdd1 b")]
    assert learned(CHATML, messages) == ["a \ufdd01\ufdd1 b<|im_end|>\n"]
