"""Candidates from another library's loader: examples with their sources and ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from colm_scale.data.examples import Examples, offsets_of
from colm_scale.errors import UserError
from colm_scale.records import long_tensor

ID = "coreset_id"
"""Column with an example's id; `numbered` adds it, with the row's number, if it is missing."""
Row = Mapping[str, Any]
"""A row of a data set, raw or collated."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a row that describe its example.

    Attributes:
        source: Column with the source.
        protected: Optional column, true for an example that enters the coreset whenever it is a candidate.
        names: ``[Q]`` the sources.
    """

    source: str
    protected: str
    names: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.source, self.protected, ID

    def number(self, row: Row) -> int:
        """The source of a row, 0..Q-1.

        Raises:
            UserError: The source is missing or unknown.
        """
        name = str(row.get(self.source, ""))
        if name not in self.names:
            raise UserError(
                f"an example has the {self.source} {name!r}, which is not among the sources: {', '.join(self.names)}"
            )
        return self.names.index(name)


def as_examples(
    rows: Sequence[Row], collated: Sequence[Row], columns: Columns
) -> Examples:
    """Make examples from rows and each row's collated tensors, ``[1, T]`` by name.

    Examples without a token to learn are dropped and counted.

    Raises:
        UserError: There are no labels, or labels that differ from the tokens.
    """
    dropped: Counter[str] = Counter()
    found: list[tuple[Row, Tensor, Tensor]] = []
    for row, batch in zip(rows, collated):
        tokens, labelled = _tokens(batch)
        if labelled.any():
            found.append((row, tokens, labelled))
        else:
            dropped[columns.names[columns.number(row)]] += 1
    nothing = torch.zeros(0)
    return Examples(
        tokens=torch.cat([nothing.int(), *(tokens for _, tokens, _ in found)]),
        labelled=torch.cat([nothing.bool(), *(labelled for *_, labelled in found)]),
        offsets=offsets_of(long_tensor([len(tokens) for _, tokens, _ in found])),
        ids=long_tensor([int(row.get(ID, -1)) for row, *_ in found]),
        sources=long_tensor([columns.number(row) for row, *_ in found]),
        protected=torch.tensor([bool(row.get(columns.protected, False)) for row, *_ in found], dtype=torch.bool),
        source_names=columns.names,
        dropped=dict(dropped),
        cut={},
    )


def _tokens(batch: Row) -> tuple[Tensor, Tensor]:
    """Tokens ``[T]`` int32 of one example without padding, and ``[T]`` bool, those that carry loss."""
    if "labels" not in batch:
        raise UserError(f"a batch has {', '.join(batch)}, but no labels: use a data collator that makes them")
    tokens, labels = (batch[name].reshape(-1).cpu() for name in ("input_ids", "labels"))
    if "attention_mask" in batch:
        real = batch["attention_mask"].reshape(-1).cpu().bool()
        tokens, labels = tokens[real], labels[real]
    labelled = labels != -100
    if (labels != tokens)[labelled].any():
        raise UserError(
            "labels are not the tokens themselves: coresets are made for causal language models, whose labels are "
            "input_ids, or -100 where nothing is learned"
        )
    labelled[:1] = False
    return tokens.int(), labelled


def rows_of(batch: Mapping[str, Tensor | Sequence[object]]) -> list[dict[str, object]]:
    """Split a collated batch into its examples."""
    count = len(batch["input_ids"])
    return [{name: values[number] for name, values in batch.items()} for number in range(count)]


class CandidateCollator:
    """Makes examples from a loader's rows, each collated alone by another collator."""

    def __init__(self, inner: Callable[[list[dict[str, object]]], Row], columns: Columns):
        self._inner, self._columns = inner, columns

    def __call__(self, rows: Sequence[Row]) -> Examples:
        ours = self._columns.all
        plain = [{name: value for name, value in row.items() if name not in ours} for row in rows]
        return as_examples(rows, [self._inner([row]) for row in plain], self._columns)


class _Numbered(Dataset[dict[str, object]]):
    def __init__(self, rows: Any):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {ID: index, **self._rows[index]}


def numbered(data: Any) -> object:
    """Add the row's number to each row of a data set, before anything shuffles or filters it.

    Raises:
        UserError: The data set is a stream of another library than ``datasets``.
    """
    if isinstance(data, datasets.Dataset):
        return data if ID in data.column_names else data.add_column(ID, list(range(len(data))))
    if isinstance(data, datasets.IterableDataset):
        return data.map(lambda row, number: {ID: number, **row}, with_indices=True)
    if isinstance(data, torch.utils.data.IterableDataset):
        raise UserError("train_dataset is a stream whose rows cannot be numbered: use a datasets.IterableDataset")
    return _Numbered(data)


def count_sources(data: Any, column: str) -> dict[str, int]:
    """Count the examples of each source, by name.

    Raises:
        UserError: The data set has no such column or is a stream.
    """
    if isinstance(data, torch.utils.data.IterableDataset):  # includes the datasets library's
        raise UserError("train_dataset is a stream, which cannot be counted: add sources={NAME: EXAMPLES, ...}")
    is_table = isinstance(data, datasets.Dataset)
    columns = data.column_names if is_table else [*data[0]]
    if column not in columns:
        raise UserError(
            f"train_dataset has no column {column!r} with the source of each example (it has {', '.join(columns)}): "
            f"add one, or name it with coreset=RunConfig(data=DataConfig(columns={{'source': ...}}), selection=...)"
        )
    values = data.with_format(None)[column] if is_table else (data[index][column] for index in range(len(data)))
    return dict(Counter(map(str, values)))
