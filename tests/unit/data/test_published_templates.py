"""Every chat template that TRL installs, with seven chats: what is learned is right, or refused with its true cause.

What is right is checked against transformers' own rendering, which knows nothing of spans.
"""

from __future__ import annotations

import copy
import json
import re
from datetime import datetime
from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from colm_scale.data.chats import ChatTemplate
from colm_scale.data.messages import read_messages
from colm_scale.data.readers import Row
from colm_scale.errors import UserError

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}}
TOOL = {"type": "function", "function": {"name": "lookup", "description": "looks up", "parameters": PARAMETERS}}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "lookup", "arguments": {"city": "Oslo"}}}


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


TOOL_SAID = {"role": "tool", "name": "lookup", "tool_call_id": "abcdefghi", "content": "cherry three"}
CHATS = {
    "one turn": [user("apple one"), assistant("banana two")],
    "two turns": [user("apple one"), assistant("banana two"), user("cherry three"), assistant("damson four")],
    "system": [{"role": "system", "content": "grape zero"}, user("apple one"), assistant("banana two")],
    "tools": [user("apple one"), assistant("", tool_calls=[CALL]), TOOL_SAID, assistant("damson four")],
    "thinking": [user("apple one"), assistant("banana two", reasoning_content="elder nine")],
    "thinking twice": [
        *[user("apple one"), assistant("banana two", reasoning_content="elder nine")],
        *[user("cherry three"), assistant("damson four", reasoning_content="fig ten")],
    ],
    "assistant first": [assistant("banana two"), user("cherry three"), assistant("damson four")],
}


def row_of(name: str) -> Row:
    messages = read_messages(CHATS[name], "messages", "a.jsonl line 1")
    return Row(0, "s", messages, "", "", "a.jsonl line 1", tools=(TOOL,) if name == "tools" else ())


def whole(source: str, name: str, turns: int | None = None, *, prompt: bool = False, as_sent: bool = False) -> str:
    """Render by transformers, as parts if that is all that the template reads.

    Args:
        as_sent: Give calls as servers send them: without a content, the arguments as JSON.
    """
    messages = copy.deepcopy(CHATS[name][:turns])
    for message in messages if as_sent else ():
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            message["content"] = None
    for message in messages:
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]  # as transformers does itself, but not in all versions
    in_parts = "selectattr('type', 'equalto', 'text')" in source or "line in message[" in source
    for message in messages if in_parts else ():
        message["content"] = [{"type": "text", "text": message["content"]}]
    tools = [TOOL] if name == "tools" else None
    rendered, _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=prompt, **SPECIAL
    )
    return str(rendered[0])


def without_dates(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d|\d+ \w+ \d{4}|\w+ \d+, \d{4}", "DATE", text)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_what_is_learned_is_right_or_refused_with_its_cause(path, name):
    source = path.read_text()
    chat = CHATS[name]
    turns = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    try:
        found = ChatTemplate(source, SPECIAL, datetime.now()).render(row_of(name))
    except UserError as error:
        said = str(error)
        if "refuses these messages" in said:
            with pytest.raises(Exception, match=r"."):
                whole(source, name)
        elif "the generation prompt ends in" in said:
            text = whole(source, name)
            prompts = [whole(source, name, turn, prompt=True) for turn in turns if turn]
            first_opens_a_thought = "<think>" in text.split("banana two")[0]
            assert not all(map(text.startswith, prompts)) or ("message 1 of" in said and not first_opens_a_thought)
        else:
            assert "inside message 2, which is the assistant's" in said
            between = whole(source, name).split("lookup")[-1].split("damson four")[0]
            assert "cherry three" in between
        return
    as_sent = "Oslo" in found.text and "Oslo" not in whole(source, name)
    assert without_dates(found.text) == without_dates(whole(source, name, as_sent=as_sent))
    learned = [found.text[begin:end] for begin, end in found.learned]
    for key in found.left_out:
        number, key = re.fullmatch(r"messages\[(\d)\]\.(\w+)", key).groups()
        words = {"tool_calls": "lookup", "content": chat[int(number)]["content"]}.get(key) or chat[int(number)][key]
        assert words not in (found.text if name != "tools" else "".join(learned))
    assert len(learned) == len(turns)
    for turn, part in zip(turns, learned):
        if f"messages[{turn}].content" not in found.left_out:
            assert chat[turn]["content"] in part
        others = [message["content"] for message in chat if message["role"] != "assistant"]
        assert not any(other in part for other in others)
    if "{% generation" not in source and "{%- generation" not in source:
        for turn, (begin, _) in zip(turns, found.learned):
            if turn == turns[0] and turn:
                assert found.text[:begin] == whole(source, name, turn, prompt=True)
