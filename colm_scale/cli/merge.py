"""``colm-scale merge``: an adapter into its base model."""

from __future__ import annotations

from collections.abc import Sequence

from colm_scale.config.command_line import parse_own
from colm_scale.config.commands import MergeConfig


def run(arguments: Sequence[str]) -> None:
    """Write the model, and say how near it is to the adapted one.

    Raises:
        UserError: Wrong input.
    """
    options = parse_own("merge", MergeConfig, arguments)
    from colm_scale.adapter.merge import export
    from colm_scale.run.process import quieten

    quieten()
    merged = export(options)
    for note in merged.notes:
        print(note)
    if merged.difference is not None:
        print(
            f"merged and adapted model: logits differ by at most {merged.difference:.3g} (the largest is "
            f"{merged.largest:.3g}), the likeliest next token is the same after {merged.same_tokens:.1%} of the tokens"
        )
    print(f"written: {merged.place}, {merged.total_bytes / 1e6:,.1f} MB of weights")
