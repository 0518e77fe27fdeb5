"""The options of ``colm-scale sources``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from colm_scale.config import ModelConfig, RowConfig
from colm_scale.config.checks import require
from colm_scale.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SourcesOptions:
    """Find the sub-populations of data that has no labels: embed every row with a small model, cluster, and write the
    source of each row to a file that --data.sources of a run takes, with a report beside it."""

    files: list[str]
    """The training data: files (.jsonl, .json, .parquet, .csv, .xlsx) or hub data sets, as --data.train has them."""
    data: RowConfig = field(default_factory=RowConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter for the model, for instance of a short run on this data."""
    embedding: Literal["auto", "states", "words"] = "auto"
    """states: the mean of the model's last hidden states over a row's tokens; by default of the built-in base. words:
    TF-IDF of its words, reduced by a singular value decomposition; no model. auto: states where a model or an adapter
    is named, else words, which tell more than the built-in base does."""
    method: Literal["kmeans", "hdbscan"] = "kmeans"
    """kmeans: for each number of `clusters`. hdbscan: as many as are dense, of at least `smallest` rows."""
    clusters: list[int] = field(default_factory=lambda: [4, 6, 8, 12, 16, 24, 32])
    """kmeans: numbers of clusters to try; the largest stable one is taken."""
    stability: float = 0.8
    """kmeans: least agreement (adjusted Rand index) of two clusterings, each of another half of the rows, for a number
    of clusters to be stable. If none is, the most stable number is taken."""
    smallest: int = 50
    """hdbscan: fewest rows of a cluster, among the 20,000 that it looks at."""
    dimensions: int = 32
    """Principal components that are clustered."""
    nearest: int = 3
    """Rows nearest to the centre of each cluster that the report shows."""
    batch_tokens: int = 8192
    """Most tokens of one forward."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the model's weights."""
    seed: int = 0
    """Seed of every random draw."""
    threads: int | None = None
    """CPU threads. Default: as many as the libraries take."""
    output_dir: str = "sources"
    """Folder for sources.jsonl, report.json, report.txt and map.png."""

    def __post_init__(self) -> None:
        require(bool(self.clusters) and min(self.clusters) >= 2, "clusters", self.clusters, "numbers of at least 2")
        require(0 <= self.stability <= 1, "stability", self.stability, "in [0, 1]")
        require(self.smallest >= 2, "smallest", self.smallest, "at least 2")
        require(self.dimensions >= 2, "dimensions", self.dimensions, "at least 2")
        require(self.nearest >= 0, "nearest", self.nearest, "0 or more")
        require(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "at least 1")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        if self.embedding == "words" and (self.model.name or self.adapter):
            given = "--model.name" if self.model.name else "--adapter"
            raise UserError(f"--embedding words takes no model: leave {given} out, or give --embedding states")
        if self.model.quantize != "none":
            raise UserError("--model.quantize is not for --embedding states, whose model is small: leave it out")

    @property
    def by_words(self) -> bool:
        """Whether rows are embedded without a model."""
        return self.embedding == "words" or (self.embedding == "auto" and not (self.model.name or self.adapter))
