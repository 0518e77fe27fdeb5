"""Randomness is an argument: every draw comes from a private generator keyed by what it is for.

The global generators of torch, numpy and random are never touched by colm_scale, so a user's own randomness is
unaffected, and a draw depends on nothing but its key: not on the rank, the device, or what was drawn before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU generator for one purpose, e.g. ``generator(7, "shuffle", epoch)``; equal on every rank.

    A rank-distinct draw puts the rank into ``index``. Draw on the CPU and move the result: the CPU generator gives the
    same numbers whatever the device.
    """
    return torch.Generator(device="cpu").manual_seed(_key(seed, purpose, index))


@contextmanager
def global_draws(device: torch.device, seed: int, purpose: str, *index: int) -> Iterator[None]:
    """A block in which torch's global generators draw what the key says; afterwards they are as they were.

    For what can draw from nothing else: dropout, and peft when it makes adapters.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_key(seed, purpose, index))  # noqa: TID251
        yield


def _key(seed: int, purpose: str, index: tuple[int, ...]) -> int:
    digest = hashlib.sha256(":".join([str(seed), purpose, *map(str, index)]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
