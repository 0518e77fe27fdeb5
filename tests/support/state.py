"""Everything that objects hold, by the path to it, to compare what they were with what they are."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Set
from enum import Enum

import numpy as np
import torch
from torch import Tensor

Leaves = dict[str, object]
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Enum)
_WALKED = ("colm_scale.", "support.", "deepspeed.", "torch.nn.", "torch.optim.", "transformers.", "peft.")
"""Prefixes of modules whose objects are walked; others, such as locks and loggers, hold nothing to compare."""


def leaves(thing: object, name: str) -> Leaves:
    """Copies of all numbers, texts and tensors that can be reached from ``thing``, each under one path."""
    return dict(_walk(thing, name, {}))


def random_states() -> Leaves:
    """The states of the global generators."""
    return leaves({"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}, "rng")


def changed(before: Leaves, after: Leaves) -> list[str]:
    """Paths whose values differ or that are in one alone."""
    return [path for path in sorted({*before, *after}) if not _equal(before.get(path, ...), after.get(path, ...))]


def _walk(thing: object, path: str, seen: dict[int, object]) -> Iterator[tuple[str, object]]:
    if isinstance(thing, _PLAIN):
        yield path, thing
        return
    if id(thing) in seen or isinstance(thing, type) or callable(getattr(thing, "__wrapped__", None)):
        return
    seen[id(thing)] = thing  # keeps it alive, so that its id stays its own
    if isinstance(thing, Tensor):
        local = thing.to_local() if hasattr(thing, "to_local") else thing
        yield path, None if local.is_meta else local.detach().clone()
        yield from _walk(thing.grad if thing.is_leaf else None, f"{path}.grad", seen)
        yield from _items({name: held for name, held in vars(thing).items() if isinstance(held, Tensor)}, path, seen)
    elif isinstance(thing, torch.Generator):
        yield path, thing.get_state()
    elif isinstance(thing, np.ndarray):
        yield path, thing.copy()
    elif isinstance(thing, Mapping):
        yield from _items(thing, path, seen)
    elif isinstance(thing, (str, bytes)) or not isinstance(thing, Iterable) or hasattr(thing, "__dict__"):
        if f"{type(thing).__module__}.".startswith(_WALKED):
            slots = [slot for kind in type(thing).__mro__ for slot in getattr(kind, "__slots__", ())]
            held = {slot: getattr(thing, slot) for slot in slots if hasattr(thing, slot)}
            yield from _items(held | getattr(thing, "__dict__", {}), path, seen)
    elif isinstance(thing, Set):
        yield from _items(dict(enumerate(sorted(thing, key=repr))), path, seen)
    elif hasattr(thing, "__len__"):
        yield from _items(dict(enumerate(thing)), path, seen)


def _items(held: Mapping, path: str, seen: dict[int, object]) -> Iterator[tuple[str, object]]:
    for number, (key, value) in enumerate(held.items()):
        # A tensor as a key, as in an optimizer's state, goes by its number.
        label = key if isinstance(key, (str, int)) else number
        yield from _walk(value, f"{path}.{label}", seen)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return type(one) is type(other) and (one == other or (one != one and other != other))
