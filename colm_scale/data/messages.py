"""Messages of a chat, in OpenAI's and ShareGPT's forms, checked and brought into one form.

{"role": "assistant", "content": "...", "tool_calls": [...], "reasoning_content": "...", "train": true}
{"from": "gpt", "value": "...", "weight": 1}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from colm_scale.data.formats import as_flag, is_missing, shown
from colm_scale.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
_CALLS = ("function_call", "tool_call")
"""Roles of a turn that consists of calls of tools."""
_OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    **dict.fromkeys(_CALLS, "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool"),
}
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what an assistant thought before it spoke. Templates get the first name."""
_LEARNED = ("train", "training", "loss", "weight")
"""Names of marks that say whether a turn is learned."""
_THOUGHT_AND_CALL = re.compile(r"(.*</think>)\s*([\[{].*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: One of `ROLES`.
        content: May be empty, for instance beside calls of tools.
        parts: The texts of a content that is a list; empty if it is a text.
        more: Its other keys that have a value, as the chat template gets them.
        learned: False if the row says that this turn carries no loss.
    """

    role: str
    content: str
    parts: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    learned: bool = True

    @property
    def said(self) -> list[object]:
        """All of it, for digests; a plain message is its role and content."""
        plain = not self.parts and not self.more and self.learned
        return [self.role, self.content, *([] if plain else [self.parts, self.more, self.learned])]


def read_messages(value: Any, column: str, where: str, *, learned: bool = True) -> tuple[Message, ...]:
    """Read a list of messages.

    Args:
        column, where: Its column, and file and line, for messages.
        learned: Whether the assistant's turns carry loss unless a turn says otherwise.

    Raises:
        UserError: It is not a list of messages.
    """
    value = parsed_json(value)
    if not isinstance(value, list):
        raise UserError(f"{where}: {column!r} is {shown(value)}, but must be a list of {{role, content}}")
    return tuple(_message(turn, f"{column}[{number}]", where, learned) for number, turn in enumerate(value))


def check_learnable(messages: tuple[Message, ...], column: str, where: str) -> tuple[Message, ...]:
    """Check that a chat has a turn of the assistant."""
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{where}: {column!r} has no turn of the assistant, so there is nothing to learn")
    return messages


def read_tools(value: Any, column: str, where: str) -> tuple[dict[str, Any], ...]:
    """Read the tools that a row offers, a list of objects or JSON of one; none if it is empty.

    Raises:
        UserError: It is something else.
    """
    found = parsed_json(value.strip() if isinstance(value, str) else value)
    if found in (None, "", "null"):
        return ()
    if isinstance(found, list):
        found = [parsed_json(tool) for tool in found]
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise UserError(f"{where}: {column!r} is {shown(value)}, but must be a list of tools, each an object")
    return tuple(found)


def _message(turn: Any, name: str, where: str, learned: bool) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: {name} is {shown(turn)}, but must be an object with role and content")
    keys = {key: value for key, value in turn.items() if not is_missing(value)}  # as if they were not there
    speaker, said = ("role", "content") if "role" in keys or "from" not in keys else ("from", "value")
    written, content, calls = keys.pop(speaker, None), keys.pop(said, ""), keys.pop("function_call", None)
    role = _OTHER_ROLES.get(written, written) if isinstance(written, str) else written
    if written in _CALLS:
        content, calls = _thought_and_calls(content)
    if role not in ROLES:
        raise UserError(f"{where}: the role of {name} is {shown(role)}, but must be one of {', '.join(ROLES)}")
    learned = _learned(keys, name, where, learned)
    parts = _parts(content, f"{name}.content", where)
    if calls is not None:
        keys["tool_calls"] = [
            call if isinstance(call, dict) and "function" in call else {"type": "function", "function": call}
            for call in (calls if isinstance(calls, list) else [calls])
        ]
    more = _more(keys, name, where)
    says = "tool_calls" in more or "reasoning_content" in more
    if role == "assistant" and learned and not says and not "".join(parts).strip():
        raise UserError(
            f"{where}: '{name}.content' is empty, so there is nothing to learn: fill it or leave the row out"
        )
    return Message(role, "\n".join(parts), parts if isinstance(content, list) else (), more, learned)


def _learned(keys: dict[str, Any], name: str, where: str, default: bool) -> bool:
    """Take out the marks that say whether a turn is learned."""
    learned = default
    for key in [key for key in _LEARNED if key in keys]:
        value = keys.pop(key)
        try:
            learned &= as_flag(int(value) if value in (0.0, 1.0) else value)
        except ValueError as error:
            raise UserError(
                f"{where}: '{name}.{key}' is {error}, but must be 1 (the turn is learned) or 0: other weights of turns "
                "are not supported"
            ) from error
    return learned


def _thought_and_calls(value: Any) -> tuple[Any, Any]:
    """Read ShareGPT's calls of tools, JSON of one or of a list, and the thought that may stand before them."""
    if isinstance(value, str) and (found := _THOUGHT_AND_CALL.fullmatch(value)):
        return found[1], parsed_json(found[2])
    return "", parsed_json(value)


def _more(keys: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """Bring the other keys into the form that templates read."""
    found = {key: "\n".join(_parts(keys.pop(key), f"{name}.{key}", where)) for key in _REASONING if key in keys}
    thoughts = {key: text for key, text in found.items() if text.strip()}
    if len(set(thoughts.values())) > 1:
        raise UserError(f"{where}: {name} has different {' and '.join(thoughts)}: leave one of them out")
    if thoughts:
        keys["reasoning_content"] = next(iter(thoughts.values()))
    if "tool_calls" in keys:
        keys["tool_calls"] = _calls(keys["tool_calls"], f"{name}.tool_calls", where)
    return {key: value for key, value in keys.items() if value not in ("", [], {})}


def _calls(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Read calls of tools, whose arguments may be JSON: templates get objects, as servers give them."""
    calls = parsed_json(value)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: {name!r} is {shown(value)}, but must be a list of calls, each an object")
    found = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise UserError(f"{where}: {name!r} has a call without the name of a function: {shown(call)}")
        function = {**inner, "arguments": parsed_json(inner.get("arguments", {}))}
        found.append({**call, "function": function} if "function" in call else {"function": function})
    return found


def _parts(content: Any, name: str, where: str) -> tuple[str, ...]:
    """Read a content: a text, or a list of texts."""
    if isinstance(content, str):
        return (checked_text(content, name, where),)
    if not isinstance(content, list):
        raise UserError(f"{where}: {name!r} is {shown(content)}, but must be text")
    found = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise UserError(f"{where}: {name!r} has a part of type {shown(part['type'])}, but only text can be trained")
        found.append(checked_text(text, name, where))
    return tuple(found)


def checked_text(value: Any, name: str, where: str) -> str:
    """Return ``value`` if it is valid text.

    Raises:
        UserError: It is not.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} is {shown(value)}, but must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise UserError(f"{where}: {name!r} holds half a character, {half!r}, which is not valid text") from error
    return value


def parsed_json(value: Any) -> Any:
    """Parse JSON that stands in a text, as in files whose columns have one type; other text stays as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
