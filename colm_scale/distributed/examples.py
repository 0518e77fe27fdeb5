"""Exchange of examples between ranks, as tensors of known sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.data.examples import Examples, joined, offsets_of
from colm_scale.distributed.group import Group
from colm_scale.errors import TrainingError
from colm_scale.records import long_tensor


def encoded(examples: Examples) -> tuple[Tensor, Tensor]:
    """Encode examples as ``[3, n]`` int64 ids, sources and lengths, and ``[total]`` int32 concatenated tokens.

    Tokens with loss, and sources of protected examples, are stored as their complement, a negative number.
    """
    sources = torch.where(examples.protected, ~examples.sources, examples.sources)
    tokens = torch.where(examples.labelled, ~examples.tokens, examples.tokens)
    return torch.stack([examples.ids, sources, examples.lengths]), tokens


def decoded(rows: Tensor, tokens: Tensor, source_names: tuple[str, ...]) -> Examples:
    """Decode the result of `encoded`; counts of dropped and cut examples are lost."""
    ids, sources, lengths = rows
    return Examples(
        tokens=torch.where(tokens < 0, ~tokens, tokens),
        labelled=tokens < 0,
        offsets=offsets_of(lengths),
        ids=ids,
        sources=torch.where(sources < 0, ~sources, sources),
        protected=sources < 0,
        source_names=source_names,
        dropped={},
        cut={},
    )


def gather_examples(parts: Sequence[Examples], group: Group) -> Examples:
    """Gather the examples of all ranks on every rank: the first part of each rank in turn, then the second parts, etc.

    This is the order in which a sampler deals parts to ranks, whatever the number of ranks. Moves ``W (32 S + 4 T)``
    bytes, where S and T are the largest numbers of examples and tokens of a rank.

    Args:
        parts: This rank's, one or more; with the same sources on every rank.

    Returns:
        All examples; ``dropped`` is summed.

    Raises:
        TrainingError: On every rank: ranks have different numbers of parts, or no rank has an example.
    """
    own, names, device = joined(parts), parts[0].source_names, group.device
    dropped = [sum(part.dropped.get(name, 0) for part in parts) for name in names]
    sizes = group.all_gather(long_tensor([len(parts), len(own), len(own.tokens), *dropped]).to(device), "rows").cpu()
    if len(sizes[:, 0].unique()) > 1 or not sizes[:, 1].any():
        raise TrainingError(
            f"ranks have {sizes[:, 0].tolist()} batches with {sizes[:, 1].tolist()} examples to learn from: give "
            f"every rank as many batches as the others, and at least one rank an example"
        )
    rows, tokens = encoded(own)
    number = torch.arange(len(parts)).repeat_interleave(long_tensor([len(part) for part in parts]))
    rows = F.pad(torch.cat([rows, number.unsqueeze(0)]), (0, int(sizes[:, 1].max()) - len(own)))
    tokens = F.pad(tokens, (0, int(sizes[:, 2].max()) - len(tokens)))
    rows = group.all_gather(rows.to(device), "rows").cpu()
    tokens = group.all_gather(tokens.to(device), "rows").cpu()
    rows = rows.transpose(1, 2)[torch.arange(rows.shape[2]) < sizes[:, 1:2]].T
    tokens = tokens[torch.arange(tokens.shape[1]) < sizes[:, 2:3]]
    whole, order = decoded(rows[:3], tokens, names), rows[3].argsort(stable=True)
    left_out = zip(names, sizes[:, 3:].sum(0).tolist())
    return dataclasses.replace(whole.take(order), dropped={name: count for name, count in left_out if count})
