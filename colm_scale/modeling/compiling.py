"""torch.compile of decoder blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from colm_scale.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Compile a small function.

    Raises:
        UserError: This machine has no C++ compiler, or no Triton for its GPU.
    """
    try:
        torch.compile(lambda x: (x * x).sin())(torch.ones(8, device=device))
    except Exception as error:  # compilers and their callers raise many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--train.compile true: torch cannot compile for {device.type} here ({reason}): install a C++ compiler "
            f"(and Triton on a GPU), or leave it out"
        ) from None


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block's ``forward``, for batches of any shape, at its first call.

    Hooks on the block itself (of sharding engines, of the sketch) still run, outside the compiled code. Hooks inside it
    would be lost or split the graph, so the blocks that the sketch hooks inside must not be compiled.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


@contextmanager
def uncompiled() -> Iterator[None]:
    """A context in which every forward runs without compiled code."""
    with torch.compiler.set_stance("force_eager"):
        yield
