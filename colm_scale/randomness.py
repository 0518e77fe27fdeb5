"""Random generators keyed by seed and purpose.

colm_scale never draws from the global generators of torch, numpy and random. The user's own randomness is unaffected,
and a draw depends only on its key, not on the rank, the device or earlier draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """Make a CPU generator for one purpose, e.g. ``generator(7, "shuffle", epoch)``; equal on every rank.

    For a rank-distinct draw, put the rank into ``index``. Draw on the CPU and move the result, so that the numbers do
    not depend on the device.
    """
    return torch.Generator(device="cpu").manual_seed(_key(seed, purpose, index))


@contextmanager
def global_draws(device: torch.device, seed: int, purpose: str, *index: int) -> Iterator[None]:
    """Seed torch's global generators with the key inside the block, and restore them afterwards.

    Only for code that cannot take a generator: dropout, and peft when it makes adapters. For a model on the meta
    device, it draws on the CPU.
    """
    kind = "cpu" if device.type == "meta" else device.type
    with torch.random.fork_rng(devices=[] if kind == "cpu" else [device], device_type=kind):
        torch.manual_seed(_key(seed, purpose, index))  # noqa: TID251
        yield


def _key(seed: int, purpose: str, index: tuple[int, ...]) -> int:
    digest = hashlib.sha256(":".join([str(seed), purpose, *map(str, index)]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
