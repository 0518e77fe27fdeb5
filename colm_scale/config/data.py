"""The options of the data."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from colm_scale.config.checks import require, require_least
from colm_scale.config.rules import DATA, check
from colm_scale.errors import UserError

_TEXT_ROLES = ("instruction", "input", "output", "prompt", "completion", "text")
COLUMN_ROLES = ("source", "protected", *_TEXT_ROLES, "messages", "tools", "system", "history")
"""Roles of columns; a column that `RowConfig.columns` does not rename has the name of its role."""


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """The columns and the format of the rows."""

    columns: dict[str, str] = field(default_factory=dict)
    """Columns whose names differ from their roles, e.g. '{instruction: question, output: answer}'. A row has messages
    (a chat, with tools and system if there are; only the assistant's turns carry loss), or prompt and completion, or
    instruction and output (with input, system and history), or text. Optional roles are source (default: the file's
    name) and protected: true for an example that colm and stratified train on whenever it is a candidate."""
    protected_sources: list[str] | None = None
    """Sources whose examples are all protected, as if every row were marked so; independent of the kept sources."""
    chat_template: str | None = None
    """File with a Jinja chat template for `messages`. Default: the tokenizer's own."""
    left_out: Literal["refuse", "count"] = "refuse"
    """What to do with a chat of which the chat template leaves something out (some leave out earlier thinking): refuse
    it, or learn what the template writes, and count such rows per source."""
    now: str | None = None
    """Date and time that chat templates may write, like 2026-11-29T12:00. Default: those of the run's first start."""
    template: str = "{instruction}\n"
    """Format of a prompt before it is tokenised; `{instruction}` is the row's prompt."""
    max_length: int | None = None
    """Longest example in tokens. Default: the model's context length, at most 2,048."""

    def __post_init__(self) -> None:
        for role in self.columns:
            if role not in COLUMN_ROLES:
                near = difflib.get_close_matches(role, COLUMN_ROLES, n=1)
                hint = f": did you mean {near[0]!r}?" if near else ":"
                roles = ", ".join(COLUMN_ROLES)
                raise UserError(f"--data.columns names a column for {role!r}{hint} The roles are {roles}")
        require("{instruction}" in self.template, "data.template", self.template, "text with {instruction} in it")
        require_least(self, "data.", max_length=2)
        try:
            datetime.fromisoformat(self.now or "2026-11-29")
        except ValueError:
            raise UserError(f"--data.now is {self.now!r}, but must be a date and time like 2026-11-29T12:00") from None

    def column(self, role: str) -> str:
        """The column that has the role in the user's files."""
        return self.columns.get(role, role)


@dataclass(frozen=True, kw_only=True)
class DataConfig(RowConfig):
    """The training data and the held-out data."""

    train: list[str] | None = None
    """Files (.jsonl, .json, .parquet, .csv, .xlsx; .gz and .zst), folders, patterns, or hub data sets (ORG/NAME,
    also with :SPLIT, :CONFIG or :CONFIG:SPLIT), one or more. Default: the built-in mixture of maths problems."""
    eval: list[str] | None = None
    """Held-out data, in the same forms. Default: the built-in held-out split if the training data is built in, else
    none."""
    sources: str | None = None
    """File with the source of each row of `train`, as written by `colm-scale sources`; overrides the sources in the
    rows."""
    overlong: Literal["drop", "cut"] = "drop"
    """Drop an example longer than `max_length`, or cut its end. Both are counted per source."""
    streaming: bool = False
    """Read the training data (.jsonl files or hub data sets) on rank 0 as it is needed, instead of holding it in
    memory. A first pass checks every row and counts the sources."""
    shuffle_rows: int = 16384
    """Size of the shuffle buffer with `streaming`, in rows."""

    @property
    def has_held_out(self) -> bool:
        """True if there is held-out data: the user's, or the built-in split with built-in training data."""
        return bool(self.eval) or not self.train

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least(self, "data.", shuffle_rows=1)
        check(self, DATA)
