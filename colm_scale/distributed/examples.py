"""Examples on their way between ranks, as tensors of known sizes."""

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
    """``[3, n]`` int64 ids, sources and lengths, and ``[total]`` int32 tokens one example after the other.

    Tokens that carry loss are there as their complement, which is negative; so are the sources of protected examples.
    """
    sources = torch.where(examples.protected, ~examples.sources, examples.sources)
    tokens = torch.where(examples.labelled, ~examples.tokens, examples.tokens)
    return torch.stack([examples.ids, sources, examples.lengths]), tokens


def decoded(rows: Tensor, tokens: Tensor, source_names: tuple[str, ...]) -> Examples:
    """What `encoded` was given, but for what was left out of it."""
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
    """The examples of all ranks on every rank: the first part of each rank, in the order of ranks, then the second ...

    So they are in the order in which a sampler gave them out, part by part to rank after rank, whatever the number of
    ranks. With S the most examples and T the most tokens of a rank, ``W (32 S + 4 T)`` bytes.

    Args:
        parts: This rank's, one or more; of the same sources on every rank.

    Returns:
        What was left out of the parts is added up.

    Raises:
        TrainingError: On every rank: ranks have different numbers of parts, or no example among them all.
    """
    own, names, device = joined(parts), parts[0].source_names, group.device
    dropped = [sum(part.dropped.get(name, 0) for part in parts) for name in names]
    sizes = group.all_gather(long_tensor([len(parts), len(own), len(own.tokens), *dropped]).to(device), "rows").cpu()
    if len(sizes[:, 0].unique()) > 1 or not sizes[:, 1].any():
        raise TrainingError(
            f"ranks have {sizes[:, 0].tolist()} batches with {sizes[:, 1].tolist()} examples to learn from: every rank "
            f"must be given as many batches as the others, and one of them an example"
        )
    rows, tokens = encoded(own)
    number = torch.arange(len(parts)).repeat_interleave(long_tensor([len(part) for part in parts]))
    rows = F.pad(torch.cat([rows, number.unsqueeze(0)]), (0, int(sizes[:, 1].max()) - len(own)))
    tokens = F.pad(tokens, (0, int(sizes[:, 2].max()) - len(tokens)))
    rows = group.all_gather(rows.to(device), "rows").cpu()
    tokens = group.all_gather(tokens.to(device), "rows").cpu()
    counts = enumerate(sizes[:, 1:3].tolist())
    of_ranks = [(rows[rank, :, :count], tokens[rank, :size]) for rank, (count, size) in counts]
    whole = joined([decoded(of_rank[:3], of_tokens, names) for of_rank, of_tokens in of_ranks])
    order = torch.cat([of_rank[3] for of_rank, _ in of_ranks]).argsort(stable=True)
    left_out = zip(names, sizes[:, 3:].sum(0).tolist())
    return dataclasses.replace(whole.take(order), dropped={name: count for name, count in left_out if count})
