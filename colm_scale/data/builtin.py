"""The built-in mixture: 14 sources of small maths problems whose answers can be checked without a model.

It is hard for a small coreset: sizes are as skewed as those of large instruction mixtures, there are three answer
styles, and sources teach each other little, so that a source left out is a source not learned.

Styles: ``CoT/`` one or two sentences and a line ``The answer is 42``; ``PoT/`` a straight-line program that assigns
``answer``; ``EQ/`` one linear equation in x.
"""

from __future__ import annotations

import gzip
import json
from typing import Literal

from colm_scale.base import MIXTURE
from colm_scale.config import RowConfig
from colm_scale.data.layouts import templated
from colm_scale.data.readers import Row, protected_by_name
from colm_scale.errors import UserError

Split = Literal["train", "eval"]


def builtin_rows(split: Split) -> list[dict[str, str]]:
    """Read the rows of one split, each with ``source``, ``instruction`` and ``output``.

    Train rows are shuffled over the sources; eval has 24 rows of every source, source by source. No instruction is in
    both splits, and none is twice in a split.

    Raises:
        UserError: The split is neither "train" nor "eval".
    """
    if split not in ("train", "eval"):
        raise UserError(f"the built-in data has no split {split!r}: use 'train' or 'eval'")
    with gzip.open(MIXTURE / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def builtin_as_rows(split: Split, config: RowConfig) -> list[Row]:
    """Read one split with the template and the protected sources of ``config``; its column names do not apply.

    Raises:
        UserError: As `builtin_rows`.
    """
    return [
        Row(
            id=number,
            source=row["source"],
            messages=(),
            prompt=templated(row["instruction"], config),
            completion=row["output"],
            where=f"built-in {split} data row {number + 1}",
            protected=protected_by_name(row["source"], config),
        )
        for number, row in enumerate(builtin_rows(split))
    ]
