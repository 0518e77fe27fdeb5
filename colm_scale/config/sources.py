"""The options of sources that change while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass

from colm_scale.config.checks import require


@dataclass(frozen=True, kw_only=True)
class SourcesConfig:
    """Sources that follow the mixture or the model."""

    refresh_every: int = 0
    """Steps between refreshes of the sources; 0: never. With --data.sources the examples seen since the last time are
    clustered again, by the model's hidden states as they passed by in the sketch and in training. Without it, the small
    sources among the candidates since the last time are kept from then on, and the moments begin anew: for a mixture
    that drifts."""

    def __post_init__(self) -> None:
        require(self.refresh_every >= 0, "sources.refresh_every", self.refresh_every, "0 or more")
