"""Options of the commands other than ``colm-scale train``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from colm_scale.config import ModelConfig, RowConfig
from colm_scale.config.checks import require, require_least, require_positive
from colm_scale.errors import UserError

Which = Literal["best", "last"]
Dtype = Literal["run", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter and its base model."""

    run: str
    """Folder of a run, of an adapter, or of a checkpoint."""
    adapter: Which = "best"
    """For a run: best is the adapter with the lowest held-out loss if the run was evaluated in training (--eval.every),
    else the one of the last step. last is always that of the last step."""
    model: str | None = None
    """Base model, a hub id or a folder, in place of the one the run names (if it has moved)."""
    trust_remote_code: bool = False
    """Run code from the base model's repository, regardless of the run's own setting."""
    dtype: Dtype = "run"
    """Type of the weights. run: that of the run."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig(AdapterConfig):
    """Merge the adapter of a run into its base model, and write a model folder that does not need peft."""

    output: str | None = None
    """New folder to write. Default: RUN-merged, or RUN-adapter with --adapter_only."""
    adapter_only: bool = False
    """Write only the adapter, in PEFT format."""
    device: str = "cpu"
    """Device for merging and comparing: cpu, cuda, cuda:1."""
    shard_size: str = "5GB"
    """Largest file of weights."""

    def __post_init__(self) -> None:
        known = bool(re.fullmatch(r"\d+(\.\d+)?[KMG]i?B", self.shard_size))
        require(known, "shard_size", self.shard_size, "a size such as 5GB or 500MB")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(AdapterConfig):
    """Evaluate a run's adapter: held-out loss and exact-match accuracy, source by source."""

    data: list[str] | None = None
    """Files or hub data sets to evaluate on, with the columns of the run. Default: the run's own held-out data."""
    base: bool = False
    """Also evaluate the base model without the adapter."""
    out: str | None = None
    """JSON file for the results."""
    generate: int | None = None
    """Examples per source whose answer is generated and compared. 0: loss only. Default: as in the run."""
    max_new_tokens: int | None = None
    """Longest generated answer, in tokens. Default: as in the run."""
    limit: int | None = None
    """Most examples per source. The examples left out are counted. Default: as in the run."""
    micro_batch_tokens: int | None = None
    """Forwards hold up to four times this number of tokens. Default: as in the run."""
    threads: int | None = None
    """CPU threads per rank. Default: the cores that it may use, divided by the ranks that share them."""
    tasks: str = "gsm8k,hellaswag"
    """Tasks in the lm-evaluation-harness command that is printed at the end."""

    def __post_init__(self) -> None:
        require_least(self, "", threads=1, micro_batch_tokens=1)
        if self.out and not Path(self.out).absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: there is no such folder")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check this machine for what would keep a run from working: versions, devices, network, compiler, disk."""

    output_dir: str = "runs"
    """Folder for runs, checked for free space."""
    hostfile: str | None = None
    """Hostfile of the DeepSpeed launcher to check."""
    ranks: int = 2
    """Local processes that are started to see whether they reach each other; 0: none. Under torchrun its ranks are
    tried instead, on all hosts: torchrun --nproc_per_node 8 --no-python colm-scale doctor."""
    timeout: float = 30.0
    """Seconds without an answer after which something counts as unreachable."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        require_least(self, "", ranks=0)
        require_positive(self, "", "timeout")


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Show the sources and examples that a run trained on, left out, and favoured."""

    run: str
    """Folder of the run, which may still be running."""
    out: str | None = None
    """Folder for the files: explain.json, examples.parquet (one row per example) and plots. Default: RUN/explain."""
    format: Literal["table", "json"] = "table"
    """Printed output: tables, or the contents of explain.json."""
    top: int = 10
    """Most examples in each list that is printed or in explain.json; examples.parquet has all."""
    alpha: float = 0.05
    """Share of the examples called favoured or neglected that may be so by chance; for sources, the chance that any
    is."""
    plots: bool = True
    """Draw the plots (PNG); requires matplotlib."""

    def __post_init__(self) -> None:
        require_least(self, "", top=0)
        require(0 < self.alpha < 1, "alpha", self.alpha, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The machines and the data of a planned run."""

    world_size: int = 1
    """Ranks, one per GPU."""
    tokens: int = 200
    """Tokens of an average example, prompt included."""
    sources: int = 10
    """Sources whose candidates are ranked."""
    label_share: float = 0.5
    """Share of an example's tokens that carries loss."""
    memory_gib: float | None = None
    """Memory of a GPU, in GiB. If given, the plan says what fits."""
    tflops: float | None = None
    """Compute of a rank in practice, in TFLOP per second. If given, the plan says how long a step takes at least."""

    def __post_init__(self) -> None:
        require_least(self, "plan.", world_size=1, tokens=2, sources=1)
        require_positive(self, "plan.", "memory_gib", "tflops")
        require(0 < self.label_share <= 1, "plan.label_share", self.label_share, "above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one HTML page about one or several runs, side by side. It needs no network and contains no script."""

    runs: list[str]
    """Folders of runs, at most 8; a run that is still under way is reported so far."""
    output: str = "report.html"
    """File of the page; an existing one is replaced."""


@dataclass(frozen=True, kw_only=True)
class SourcesOptions:
    """Find the sub-populations of data that has no labels: embed every row with a small model, cluster, and write the
    source of each row to a file for --data.sources of a run, along with a report."""

    files: list[str]
    """The training data: files (.jsonl, .json, .parquet, .csv, .xlsx) or hub data sets, as for --data.train."""
    data: RowConfig = field(default_factory=RowConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter for the model, for instance from a short run on this data."""
    embedding: Literal["auto", "states", "words"] = "auto"
    """states: the mean of the model's last hidden states over a row's tokens; the model is the built-in base unless one
    is named. words: TF-IDF of its words, reduced by a singular value decomposition, without a model. auto: states if a
    model or an adapter is named, else words, which are more informative than the built-in base."""
    method: Literal["kmeans", "hdbscan"] = "kmeans"
    """kmeans: try each number of `clusters`. hdbscan: all dense clusters of at least `smallest` rows."""
    clusters: list[int] = field(default_factory=lambda: [4, 6, 8, 12, 16, 24, 32])
    """kmeans: numbers of clusters to try; the largest stable one is taken."""
    stability: float = 0.8
    """kmeans: least agreement (adjusted Rand index) between clusterings of two halves of the rows for a number of
    clusters to count as stable. If none does, the most stable one is taken."""
    smallest: int = 50
    """hdbscan: fewest rows of a cluster, among the 20,000 rows it examines."""
    dimensions: int = 32
    """Principal components that are clustered."""
    nearest: int = 3
    """Rows shown in the report for each cluster, those nearest to its centre."""
    batch_tokens: int = 8192
    """Most tokens of one forward."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the model's weights."""
    seed: int = 0
    """Seed of every random draw."""
    threads: int | None = None
    """CPU threads. Default: chosen by the libraries."""
    output_dir: str = "sources"
    """Folder for sources.jsonl, report.json, report.txt and map.png."""

    def __post_init__(self) -> None:
        require(bool(self.clusters) and min(self.clusters) >= 2, "clusters", self.clusters, "numbers of at least 2")
        require(0 <= self.stability <= 1, "stability", self.stability, "in [0, 1]")
        require_least(self, "", smallest=2, dimensions=2, nearest=0, batch_tokens=1, threads=1)
        if self.embedding == "words" and (self.model.name or self.adapter):
            given = "--model.name" if self.model.name else "--adapter"
            raise UserError(f"--embedding words uses no model: leave {given} out, or use --embedding states")
        if self.model.quantize != "none":
            raise UserError("--model.quantize is not supported here, the embedding model is small: leave it out")

    @property
    def by_words(self) -> bool:
        """True if rows are embedded without a model."""
        return self.embedding == "words" or (self.embedding == "auto" and not (self.model.name or self.adapter))
