"""Layouts of rows: which columns say what the model reads, and what it learns.

    messages, conversations                 a chat, OpenAI's or ShareGPT's; only turns of the assistant are learned
    prompt, completion                      texts or messages; only the completion is learned
    instruction, output                     Alpaca's (with input, system, history) and Dolly's (context, response)
    text                                    all of it is learned

A row is read by the first of these that it fills.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from colm_scale.config import RowConfig
from colm_scale.data.formats import Record, is_missing, shortened, shown
from colm_scale.data.messages import Message, check_learnable, checked_text, parsed_json, read_messages, read_tools
from colm_scale.errors import UserError

_OTHER_NAMES = {"messages": ("conversations",), "input": ("context",), "output": ("response",)}
"""Names that columns have in ShareGPT's and Dolly's layouts, by role."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a row says.

    Attributes:
        unread: Roles of columns that its layout takes, but not in this form.
    """

    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    unread: tuple[str, ...] = ()


class Cells:
    """The cells of one record by their roles; a null or NaN is as if it were not there."""

    def __init__(self, record: Record, config: RowConfig):
        self.where, self.config = record.where, config
        self._cells = record.cells
        self.filled = {name for name, value in record.cells.items() if not is_missing(value) and value not in ("", [])}

    @property
    def names(self) -> list[str]:
        """All columns of the record."""
        return list(self._cells)

    def column(self, role: str) -> str:
        """Return the column of a role: the user's, else the first of the known ones that is there."""
        known = (role, *_OTHER_NAMES.get(role, ())) if role not in self.config.columns else ()
        return next((name for name in known if name in self.filled), self.config.column(role))

    def get(self, role: str) -> Any:
        value = self._cells.get(self.column(role))
        return None if is_missing(value) else value

    def has(self, role: str) -> bool:
        return self.column(role) in self._cells

    def text(self, role: str) -> str:
        return checked_text(self.get(role), self.column(role), self.where)

    def optional_text(self, role: str) -> str:
        """Return a text, empty if there is none."""
        return "" if self.get(role) is None else self.text(role)

    def learned_text(self, role: str) -> str:
        text = self.text(role)
        if not text.strip():
            raise UserError(
                f"{self.where}: {self.column(role)!r} is empty, so there is nothing to learn: fill it or leave the row "
                "out"
            )
        return text


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to write a row: which columns it needs, and which it reads besides.

    Attributes:
        needs: Roles of columns; what is learned stands in the last of them.
        takes: Roles of further columns.
    """

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    read: Callable[[Cells], Content]


def layout_of(cells: Cells) -> Layout:
    """Choose the first layout that a record fills, else the first whose columns it has.

    Raises:
        UserError: It has the columns of none.
    """
    ready = [layout for layout in _LAYOUTS if all(map(cells.has, layout.needs))]
    for layout in ready:
        if cells.column(layout.needs[-1]) in cells.filled and all(cells.get(role) is not None for role in layout.needs):
            return layout
    if not ready:
        raise UserError(_missing_columns(cells))
    return ready[0]


def _chat(cells: Cells) -> Content:
    column = cells.column("messages")
    messages = read_messages(cells.get("messages"), column, cells.where)
    return _content(cells, messages, column)


def _prompt_and_completion(cells: Cells) -> Content:
    """Read both as texts or, if one is a list, as messages of which those of the completion are learned."""
    prompt, completion = cells.get("prompt"), cells.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        texts = cells.text("prompt"), cells.learned_text("completion")
        return Content(prompt=texts[0], completion=texts[1], unread=("tools", "system"))  # a prompt is taken verbatim
    before, after = (
        [{"role": role, "content": value}] if isinstance(value, str) else value
        for role, value in (("user", prompt), ("assistant", completion))
    )
    column = cells.column("completion")
    messages = (
        *read_messages(before, cells.column("prompt"), cells.where, learned=False),
        *check_learnable(read_messages(after, column, cells.where), column, cells.where),
    )
    return _content(cells, messages, column)


def _content(cells: Cells, messages: tuple[Message, ...], column: str) -> Content:
    """Add the tools and the system's message that stand in columns of their own."""
    system, begin = cells.optional_text("system"), messages[:1]
    if system and begin and begin[0].role != "system":
        messages = (Message("system", system), *messages)
    elif system and begin and begin[0].content.strip() != system.strip():
        raise UserError(
            f"{cells.where}: {column!r} begins with a system message, and {cells.column('system')!r} has another one: "
            "leave one of them out"
        )
    tools = read_tools(cells.get("tools"), cells.column("tools"), cells.where)
    return Content(messages=check_learnable(messages, column, cells.where), tools=tools)


def _instruction(cells: Cells) -> Content:
    """Join system, earlier turns, instruction and the optional input, each on a new line; the output is learned."""
    instruction = "\n".join(filter(None, (cells.text("instruction"), cells.optional_text("input"))))
    earlier = _history(cells.get("history"), cells.column("history"), cells.where)
    said = [f"{templated(question, cells.config)}{answer}" for question, answer in earlier]
    prompt = "\n".join(filter(None, (cells.optional_text("system"), *said, templated(instruction, cells.config))))
    return Content(prompt=prompt, completion=cells.learned_text("output"))


def _history(value: Any, column: str, where: str) -> list[tuple[str, str]]:
    """Read Alpaca's earlier turns, pairs of an instruction and its answer."""
    turns = parsed_json(value) or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise UserError(f"{where}: {column!r} is {shown(value)}, but must be a list of pairs [instruction, answer]")
    return [(checked_text(turn[0], column, where), checked_text(turn[1], column, where)) for turn in turns]


def _text(cells: Cells) -> Content:
    return Content(completion=cells.learned_text("text"))


_LAYOUTS = (
    Layout(("messages",), ("tools", "system"), _chat),
    Layout(("prompt", "completion"), ("tools", "system"), _prompt_and_completion),
    Layout(("instruction", "output"), ("input", "system", "history"), _instruction),
    Layout(("text",), (), _text),
)


def templated(instruction: str, config: RowConfig) -> str:
    """Put an instruction into ``--data.template``."""
    # Not str.format: a template may hold braces of its own.
    return config.template.replace("{instruction}", instruction)


def _missing_columns(cells: Cells) -> str:
    there = shortened(", ".join(map(repr, cells.names))) or "(none)"
    column = cells.config.column
    return (
        f"{cells.where} has the columns {there}, but needs {column('messages')!r}, or {column('prompt')!r} and "
        f"{column('completion')!r}, or {column('instruction')!r} and {column('output')!r}, or {column('text')!r}. Map "
        "columns of other names with --data.columns, for instance --data.columns "
        "'{instruction: question, output: answer}'"
    )
