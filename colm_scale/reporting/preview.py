"""Preview of one step as a table by source and a line of work per rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from rich import box
from rich.table import Table

from colm_scale.step.preview import Preview


def by_source(preview: Preview, names: Sequence[str]) -> Table:
    """Table of candidates, kept candidates, quota and coreset by source, for sources with candidates.

    Args:
        names: ``[Q]`` names of the sources.
    """
    candidates, quota = preview.candidates, preview.quota
    of_phase = (candidates.sources, candidates.sources[quota.kept], candidates.sources[preview.drawn.positions])
    counted, kept, drawn = (torch.bincount(sources, minlength=len(names)).tolist() for sources in of_phase)
    table = Table(box=box.SIMPLE, title=f"step {candidates.step} by source", title_justify="left")
    table.add_column("source")
    for heading in ("candidates", "kept", "quota", "coreset"):
        table.add_column(heading, justify="right")
    for name, *numbers in zip(names, counted, kept, quota.per_source.tolist(), drawn):
        if numbers[0]:
            table.add_row(name, *map(str, numbers))
    return table


def arithmetic(preview: Preview) -> str:
    """Examples, tokens and micro-batches that are sketched and trained on in the step."""
    candidates, routed = preview.candidates, preview.routed
    lengths = candidates.lengths
    return (
        f"step {candidates.step}: {len(candidates)} candidates of {int(lengths.min())} to {int(lengths.max())} tokens; "
        f"{_sketched(preview)}; train {len(preview.drawn)} ({sum(routed.tokens):,} tokens) in "
        f"{len(routed.micro_batches[0])} micro-batch(es) on each of {len(routed.micro_batches)} rank(s), the busiest "
        f"with {routed.imbalance:.2f} times the mean"
    )


def _sketched(preview: Preview) -> str:
    if not len(preview.plan.positions):
        return "nothing is sketched"
    shares = preview.plan.shares
    forwarded = [*chain.from_iterable(chain.from_iterable(shares))]
    tokens = int(preview.candidates.lengths[forwarded].sum())
    return f"sketch {len(forwarded)} ({tokens:,} tokens) in {len(shares[0])} micro-batch(es) per rank"
