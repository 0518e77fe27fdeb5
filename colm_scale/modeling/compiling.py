"""torch.compile of decoder blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from colm_scale.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        UserError: This machine cannot: there is no C++ compiler, or no Triton for its GPU.
    """
    try:
        torch.compile(lambda x: (x * x).sin())(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler and those that call it may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--train.compile true: torch cannot compile for {device.type} here ({reason}): install a C++ compiler "
            f"(and Triton on a GPU), or leave it out"
        ) from None


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile what each block computes, for batches of any shape, at the first forward.

    Not the call around it: hooks on the block itself (of engines that shard, of the sketch, of kept block inputs) run
    outside as ever. What is hooked inside a compiled block is lost or breaks it in two, so a block that the sketch
    looks into stays as it is.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Every forward within it runs as if nothing had been compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield
