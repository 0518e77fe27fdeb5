"""Randomness is an argument: every draw comes from a private generator keyed by what it is for.

The global generators of torch, numpy and random are never touched by colm_scale, so a user's own randomness is
unaffected, and a draw depends on nothing but its key: not on the rank, the device, or what was drawn before.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU generator for one purpose, e.g. ``generator(7, "shuffle", epoch)``; equal on every rank.

    A rank-distinct draw puts the rank into ``index``. Draw on the CPU and move the result: the CPU generator gives the
    same numbers whatever the device.
    """
    key = ":".join([str(seed), purpose, *map(str, index)])
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
