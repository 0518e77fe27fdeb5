"""The options of sources that are found anew while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass

from colm_scale.config.checks import require


@dataclass(frozen=True, kw_only=True)
class SourcesConfig:
    """Sources that follow the model, for those that `colm-scale sources` has found (--data.sources)."""

    refresh_every: int = 0
    """Steps after which the examples that were seen since the last time are clustered anew, by the model's hidden
    states as they passed by in the sketch and in training. 0: never."""
    dimensions: int = 64
    """Numbers that are kept of an example's mean hidden state, a random projection."""

    def __post_init__(self) -> None:
        require(self.refresh_every >= 0, "sources.refresh_every", self.refresh_every, "0 or more")
        require(self.dimensions >= 2, "sources.dimensions", self.dimensions, "at least 2")
