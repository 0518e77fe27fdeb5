"""Options of the commands around a run: merge, eval, doctor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from colm_scale.config.checks import require
from colm_scale.errors import UserError

Which = Literal["best", "last"]
Dtype = Literal["run", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merge the adapter of a run into its base model, and write a model folder that needs no peft."""

    run: str
    """Folder of a run, of an adapter, or of a checkpoint."""
    output: str | None = None
    """New folder to write. Default: RUN-merged, or RUN-adapter with --adapter_only."""
    adapter: Which = "best"
    """Of a run: best is the one with the lowest held-out loss where it was evaluated while it trained (--eval.every),
    else that of the last step, as last is."""
    adapter_only: bool = False
    """Write the adapter alone, in PEFT format."""
    model: str | None = None
    """Base model, a hub id or a folder, in place of the one that the run names (it may have moved)."""
    trust_remote_code: bool = False
    """Run code that the base model's repository brings along, whatever the run did."""
    dtype: Dtype = "run"
    """Type of the weights. run: that of the run."""
    device: str = "cpu"
    """Where it is merged and compared: cpu, cuda, cuda:1."""
    shard_size: str = "5GB"
    """Largest file of weights."""

    def __post_init__(self) -> None:
        known = re.fullmatch(r"\d+(\.\d+)?[KMG]i?B", self.shard_size)
        require(known is not None, "shard_size", self.shard_size, "a size such as 5GB or 500MB")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Held-out loss and exact-match accuracy of a run's adapter, source by source."""

    run: str
    """Folder of a run, of an adapter, or of a checkpoint."""
    data: list[str] | None = None
    """Files or hub data sets to evaluate on, with the columns of the run. Default: the run's own held-out data."""
    adapter: Which = "best"
    """Of a run: best is the one with the lowest held-out loss where it was evaluated while it trained (--eval.every),
    else that of the last step, as last is."""
    base: bool = False
    """Evaluate the base model without the adapter, too."""
    out: str | None = None
    """JSON file for what was found."""
    model: str | None = None
    """Base model, a hub id or a folder, in place of the one that the run names (it may have moved)."""
    trust_remote_code: bool = False
    """Run code that the base model's repository brings along, whatever the run did."""
    dtype: Dtype = "run"
    """Type of the frozen weights and of the computation. run: that of the run."""
    generate: int | None = None
    """Examples per source whose answer is generated and compared. 0: loss only. Default: as in the run."""
    max_new_tokens: int | None = None
    """Longest generated answer, in tokens. Default: as in the run."""
    limit: int | None = None
    """Most examples per source. What is left out is counted. Default: as in the run."""
    micro_batch_tokens: int | None = None
    """A quarter of the most tokens that are forwarded at a time. Default: as in the run."""
    threads: int | None = None
    """CPU threads per rank. Default: the machine's cores shared out among its ranks."""
    tasks: str = "gsm8k,hellaswag"
    """Tasks in the line for lm-evaluation-harness that is shown at the end."""

    def __post_init__(self) -> None:
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        tokens = self.micro_batch_tokens
        require(tokens is None or tokens >= 1, "micro_batch_tokens", tokens, "at least 1")
        if self.out is not None and not Path(self.out).absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: there is no such folder")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Look for what would keep a run from working here: versions, devices, network, compiler, disk."""

    output_dir: str = "runs"
    """Folder that runs would be written to: is there room?"""
    hostfile: str | None = None
    """Hostfile of the DeepSpeed launcher to check."""
    ranks: int = 2
    """Local processes that are started to see whether they reach each other; 0: none. Under torchrun its ranks are
    tried instead, on all hosts: torchrun --nproc_per_node 8 --no-python colm-scale doctor."""
    timeout: float = 30.0
    """Seconds after which something that does not answer counts as unreachable."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        require(self.ranks >= 0, "ranks", self.ranks, "0 or more")
        require(self.timeout > 0, "timeout", self.timeout, "positive")
