"""A seeded mixture of 14 sources of small maths problems whose answers can be checked without a model.

It has what makes a mixture hard for a small coreset: sizes as skewed as those of large instruction mixtures, three
answer styles, and sources that teach each other little, so that a source left out is a source not learned.

Styles: ``CoT/`` one or two sentences and a line ``The answer is 42``; ``PoT/`` a straight-line program that assigns
``answer``; ``EQ/`` one linear equation in x.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from random import Random
from typing import Literal

from colm_scale.data import builtin_problems as problems
from colm_scale.errors import UserError

Split = Literal["train", "eval"]
Maker = Callable[[Random], tuple[str, str]]

EVAL_ROWS = 24
# Source -> (rows of the train split, maker). A third of the rows come from one source; nine sources have fewer than
# rows / 14, and three have fewer than one row in a hundred.
SOURCES: dict[str, tuple[int, Maker]] = {
    "CoT/shop": (2040, problems.shop),
    "PoT/farm": (1140, problems.farm),
    "CoT/trip": (660, problems.trip),
    "EQ/number": (540, problems.number),
    "PoT/savings": (450, problems.savings),
    "CoT/share": (320, problems.share),
    "EQ/age": (240, problems.age),
    "PoT/area": (180, problems.area),
    "CoT/compare": (150, problems.compare),
    "PoT/clock": (110, problems.clock),
    "EQ/coins": (80, problems.coins),
    "PoT/recipe": (48, problems.recipe),
    "CoT/weather": (32, problems.weather),
    "EQ/tank": (20, problems.tank),
}


def builtin_rows(split: Split, seed: int = 0) -> list[dict[str, str]]:
    """The rows of one split, each with ``source``, ``instruction`` and ``output``.

    Train rows are shuffled over the sources; eval has 24 rows of every source, source by source. Whatever the seeds,
    no instruction is in both splits, and none is twice in a split.
    """
    if split not in ("train", "eval"):
        raise UserError(f"split {split!r} of the built-in data: give 'train' or 'eval'")
    rows = [row for source in SOURCES for row in _source_rows(split, seed, source)]
    if split == "train":
        Random(f"{seed}:{split}:order").shuffle(rows)
    return rows


def _source_rows(split: Split, seed: int, source: str) -> list[dict[str, str]]:
    """The rows of one source: draws of its maker, without those of the other split and without repeats."""
    train_rows, maker = SOURCES[source]
    wanted = train_rows if split == "train" else EVAL_ROWS
    rng = Random(f"{seed}:{split}:{source}")
    rows: dict[str, str] = {}
    while len(rows) < wanted:
        instruction, output = maker(rng)
        if held_out(instruction) == (split == "eval"):
            rows.setdefault(instruction, output)
    return [{"source": source, "instruction": text, "output": out} for text, out in rows.items()]


def held_out(instruction: str) -> bool:
    """Whether an instruction belongs to eval (one in eight): a property of its text, so seeds cannot mix the splits."""
    return hashlib.sha256(instruction.encode()).digest()[0] < 32
