"""Batches of somebody else's loader as candidates: the rows of every example, its source and its id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, SupportsInt, runtime_checkable

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from colm_scale.data.examples import Examples, offsets_of
from colm_scale.errors import UserError
from colm_scale.records import long_tensor

ID = "coreset_id"
"""Column with an example's id: added with the row's number where there is none."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a row says what it is.

    Attributes:
        source: Column with the source.
        protected: Column with true for an example that enters whenever it is a candidate; it need not be there.
        names: ``[Q]`` the sources.
    """

    source: str
    protected: str
    names: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.source, self.protected, ID

    def number(self, row: Mapping[str, object]) -> int:
        """The source of a row, 0..Q-1.

        Raises:
            UserError: It has none, or one that is not known.
        """
        name = str(row.get(self.source, ""))
        if name not in self.names:
            raise UserError(
                f"an example has the {self.source} {name!r}, which is not among the sources: {', '.join(self.names)}"
            )
        return self.names.index(name)


def as_examples(
    rows: Sequence[Mapping[str, object]], collated: Sequence[Mapping[str, object]], columns: Columns
) -> Examples:
    """Examples of rows and of what a collator has made of each, ``[1, T]`` tensors by name.

    Those without a token to learn are left out and counted.

    Raises:
        UserError: A collator gives no labels, or labels that are not the tokens themselves.
    """
    dropped: Counter[str] = Counter()
    kept: list[tuple[Mapping[str, object], Tensor, Tensor]] = []
    for row, batch in zip(rows, collated):
        tokens, labelled = _tokens(batch)
        if labelled.any():
            kept.append((row, tokens, labelled))
        else:
            dropped[columns.names[columns.number(row)]] += 1
    nothing = torch.zeros(0)
    return Examples(
        tokens=torch.cat([nothing.int(), *(tokens for _, tokens, _ in kept)]),
        labelled=torch.cat([nothing.bool(), *(labelled for *_, labelled in kept)]),
        offsets=offsets_of(long_tensor([len(tokens) for _, tokens, _ in kept])),
        ids=long_tensor([_id(row) for row, *_ in kept]),
        sources=long_tensor([columns.number(row) for row, *_ in kept]),
        protected=torch.tensor([bool(row.get(columns.protected, False)) for row, *_ in kept], dtype=torch.bool),
        source_names=columns.names,
        dropped=dict(dropped),
        cut={},
    )


def _id(row: Mapping[str, object]) -> int:
    found = row.get(ID, -1)
    assert isinstance(found, SupportsInt | str)
    return int(found)


def _flat(batch: Mapping[str, object], name: str) -> Tensor:
    found = batch[name]
    assert isinstance(found, Tensor)
    return found.reshape(-1).cpu()


def _tokens(batch: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """Tokens ``[T]`` int32 of one example without its padding, and ``[T]`` bool which of them carry loss."""
    if "labels" not in batch:
        raise UserError(f"a batch has {', '.join(batch)}, but no labels: give a data collator that makes them")
    tokens, labels = _flat(batch, "input_ids"), _flat(batch, "labels")
    if "attention_mask" in batch:
        real = _flat(batch, "attention_mask").bool()
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
    """The examples of a collated batch, one by one."""
    count = len(batch["input_ids"])
    return [{name: values[number] for name, values in batch.items()} for number in range(count)]


class CandidateCollator:
    """Makes examples of a loader's rows, each as another collator makes it alone."""

    def __init__(self, inner: Callable[[list[dict[str, object]]], Mapping[str, object]], columns: Columns):
        self._inner, self._columns = inner, columns

    def __call__(self, rows: Sequence[Mapping[str, object]]) -> Examples:
        own = self._columns.all
        plain = [{name: value for name, value in row.items() if name not in own} for row in rows]
        return as_examples(rows, [self._inner([row]) for row in plain], self._columns)


@runtime_checkable
class _Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, object]: ...


class _Numbered(Dataset[dict[str, object]]):
    def __init__(self, rows: _Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {ID: index, **self._rows[index]}


def numbered(data: object) -> object:
    """A data set whose rows say their number, before anything shuffles or filters them.

    Raises:
        UserError: A stream that is not of the ``datasets`` library.
    """
    if isinstance(data, datasets.Dataset):
        return data if ID in data.column_names else data.add_column(ID, list(range(len(data))))
    if isinstance(data, datasets.IterableDataset):
        return data.map(lambda row, number: {ID: number, **row}, with_indices=True)
    if isinstance(data, torch.utils.data.IterableDataset):
        raise UserError("train_dataset is a stream whose rows cannot be numbered: give a datasets.IterableDataset")
    assert isinstance(data, _Rows)
    return _Numbered(data)


def count_sources(data: object, column: str) -> dict[str, int]:
    """Examples of each source, by name.

    Raises:
        UserError: The data set has no such column, or cannot be counted.
    """
    if isinstance(data, torch.utils.data.IterableDataset):  # those of the datasets library are too
        raise UserError("train_dataset is a stream, so give sources={NAME: EXAMPLES, ...} beside coreset")
    if isinstance(data, datasets.Dataset):
        if column not in data.column_names:
            raise _no_column(column, data.column_names)
        return dict(Counter(map(str, data.with_format(None)[column])))
    assert isinstance(data, _Rows)
    if column not in data[0]:
        raise _no_column(column, data[0])
    return dict(Counter(str(data[index][column]) for index in range(len(data))))


def _no_column(column: str, there: Iterable[str]) -> UserError:
    return UserError(
        f"train_dataset has no column {column!r} with the source of each example (it has {', '.join(there)}): add one, "
        f"or name it with coreset=RunConfig(data=DataConfig(columns={{'source': ...}}), selection=...)"
    )
