"""Comparison of what a message says with what a chat template wrote of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_WORD = re.compile(r"\w+|[^\w\s]")


def is_written_by_python(call: Mapping[str, Any], text: str) -> bool:
    """Tell whether a template has written the arguments of a call as Python does, with single quotes."""
    arguments = call["function"]["arguments"]
    return isinstance(arguments, dict) and any(map(str.isalpha, str(arguments))) and str(arguments) in text


def texts_of(value: object) -> Iterator[str]:
    """List the texts that a value of a message says: its strings, and names and arguments of calls."""
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from texts_of(item)
        case {"function": dict() as function}:
            yield from texts_of(function)
        case dict():
            for key, item in value.items():
                if key not in ("id", "type", "index"):
                    yield from texts_of(item)


def stands_in(said: str, written: str) -> bool:
    """Tell whether all words of a text stand in another, in their order. Escaped as in JSON they count too."""
    if said.strip() in written:
        return True
    forms = (said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1])
    words = _WORD.findall(written)
    return any(_in_order(_WORD.findall(form), words) for form in forms)


def _in_order(few: Sequence[str], many: Sequence[str]) -> bool:
    remaining = iter(many)
    return all(word in remaining for word in few)
