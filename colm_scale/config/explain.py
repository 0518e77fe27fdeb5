"""The options of ``colm-scale explain``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from colm_scale.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Which sources and examples a run has trained on, left out, and favoured."""

    run: str
    """Folder of the run; it may be running still."""
    out: str | None = None
    """Folder for the files: explain.json, examples.parquet (a row for each example) and plots. Default: RUN/explain."""
    format: Literal["table", "json"] = "table"
    """What is printed: tables, or what explain.json holds."""
    top: int = 10
    """Most examples in each list that is printed or in explain.json; examples.parquet has all."""
    alpha: float = 0.05
    """Share of the examples called favoured or neglected that may be so by chance; for sources, the chance that any
    is."""
    plots: bool = True
    """Draw the plots (PNG); they need matplotlib."""

    def __post_init__(self) -> None:
        require(self.top >= 0, "top", self.top, "0 or more")
        require(0 < self.alpha < 1, "alpha", self.alpha, "between 0 and 1")
