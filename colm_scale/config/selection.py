"""The options of the selection: which candidates are trained on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from colm_scale.config import user_functions as own
from colm_scale.config.checks import require
from colm_scale.config.shares import Shares, is_file, parse_shares, read_shares
from colm_scale.errors import UserError

Method = Literal["colm", "stratified", "random", "full", "replay"]
EstimatorName = Literal["last_layer", "zeroth_order", "length"]
Ranking = Literal["facility", "matching", "systematic"]
Metric = Literal["l1", "l2", "cosine"]
Weights = Literal["uniform", "cluster", "unbiased"]

MOST_COMPARED = 8192
"""Most candidates that are ever compared each with each other: the two float64 matrices that takes are 1 GiB."""


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which candidates are trained on."""

    method: Method = "colm"
    """colm: kept sources, quotas, facility location on gradient sketches. stratified: the same kept sources and quotas,
    random within. random: uniform. full: every candidate, in accumulated micro-batches. replay: what another run has
    selected."""
    replay: str | None = None
    """replay: that run's folder, or its selection.jsonl."""
    preset: Literal["none", "paper"] = "none"
    """paper: one zeroth-order probe, L1, h=2560, uniform weights, eps 1e-3 (arXiv 2407.19580), whatever the options
    below say."""
    candidates: int = 64
    """Candidates per optimizer step, over all ranks (n)."""
    budget: int = 32
    """Coreset per optimizer step, over all ranks (b)."""
    estimator: EstimatorName | str = "last_layer"
    """What is known of a candidate. last_layer: exact gradient of the probe tensor. zeroth_order: its derivatives along
    `num_probes` random directions. length: its tokens, for which nothing is forwarded. Or a function of your own,
    FILE.py:FUNCTION or MODULE:FUNCTION (docs/CONTRIBUTING.md)."""
    ranking: Ranking | str = "facility"
    """How a source's quota is picked. facility: medoids that stand for all (the paper's). matching: the subset whose
    mean gradient is nearest the candidates', by swaps. systematic: sort by one number and take every n-th. Or a
    function of your own, FILE.py:FUNCTION or MODULE:FUNCTION (docs/CONTRIBUTING.md)."""
    shares: Shares = "proportional"
    """How colm and stratified share out the budget over the sources that are not kept. proportional: to their
    candidates (the paper's). equal: the same to each. A number: to their training examples to that power (1: to their
    size, 0: equal). Or ratios of your own, '{math: 3, code: 1}', or the .yaml or .json file that holds them; every
    source that is not kept must have one, and with 0 it has no quota."""
    coverage_floor: float = 0.0
    """colm and stratified: at least this share of each source's candidates is trained on, over any stretch of steps and
    so in every pass over the data; what one step lacks the next ones make up. At most budget / candidates. 0: none."""
    num_probes: int = 1
    """Random directions of the zeroth-order estimator (K)."""
    columns: int = 512
    """Numbers per candidate that are compared (h)."""
    compression: Literal["columns", "countsketch"] = "columns"
    """last_layer: how the gradient becomes `columns` numbers. columns: its most telling ones, per source (the paper's).
    countsketch: a random projection of the update, one sign and place per number."""
    metric: Metric = "l1"
    """Distance between sketches."""
    weights: Weights = "uniform"
    """Weight of a coreset example. uniform: 1 (the paper's). cluster (facility): the number of candidates it stands
    for. unbiased: a source's picks stand for its candidates, each for as many. With a draw (systematic, stratified) the
    expected gradient is then that of all candidates, if every source has a quota. A kept example counts 1."""
    kept_sources: float | list[str] | None = None
    """Sources whose candidates are all trained on. Default: those with fewer examples than the average source (the
    paper's). A number in [0, 1]: that share of the sources, the smallest ones. Names: these; `[]`: none."""
    overflow: Literal["subset", "fail"] = "subset"
    """If not all kept candidates fit into the budget: train on a uniform draw of them (subset), or end the run
    (fail)."""
    probe: str = "v"
    """Linear layer whose LoRA B matrix is the probe: v, q, k, o (of the attention) or mlp (its last layer), found by
    what they do, or a layer's name."""
    reuse: int = 0
    """Most steps for which the sketch of an example counts when it is a candidate again; with as many as the run has,
    later epochs forward nothing. 0: every sketch is new. last_layer: not with compression columns."""

    def __post_init__(self) -> None:
        _require_part("estimator", self.estimator, EstimatorName)
        _require_part("ranking", self.ranking, Ranking)
        if (self.method == "replay") != (self.replay is not None):
            raise UserError("--selection.method replay and --selection.replay FILE belong together: give both")
        require(self.candidates >= 1, "selection.candidates", self.candidates, "at least 1")
        require(self.budget >= 1, "selection.budget", self.budget, "at least 1")
        require(
            self.budget <= self.candidates,
            "selection.budget",
            self.budget,
            f"at most --selection.candidates ({self.candidates})",
        )
        require(self.num_probes >= 1, "selection.num_probes", self.num_probes, "at least 1")
        require(self.columns >= 1, "selection.columns", self.columns, "at least 1")
        object.__setattr__(self, "shares", parse_shares(self.shares))
        if self.coverage_floor:
            self._check_coverage()
        if isinstance(self.kept_sources, (int, float)):
            require(0 <= self.kept_sources <= 1, "selection.kept_sources", self.kept_sources, "in [0, 1], or names")
        require(self.reuse >= 0, "selection.reuse", self.reuse, "0 or more")
        if self.reuse and self.preset == "none" and (self.estimator, self.compression) == ("last_layer", "columns"):
            raise UserError(
                f"--selection.reuse {self.reuse} compares sketches of several steps, and the columns that "
                f"--selection.estimator last_layer compares are others in each: add --selection.compression countsketch"
            )
        if self.reuse and self.preset == "none" and own.is_own(self.estimator):
            raise UserError(
                f"--selection.reuse {self.reuse} goes with the estimators of the package only, not with "
                f"--selection.estimator {self.estimator}: leave it out"
            )
        if self.preset == "none":
            self._check_ranking()

    def _check_coverage(self) -> None:
        """A floor that can be met, under a method that has quotas to meet it by."""
        option = f"--selection.coverage_floor {self.coverage_floor}"
        require(0 < self.coverage_floor <= 1, "selection.coverage_floor", self.coverage_floor, "in [0, 1]")
        if self.method == "random":
            raise UserError(f"{option} needs quotas, which --selection.method random has not: give stratified")
        if isinstance(self.shares, dict) and not all(self.shares.values()):
            without = ", ".join(name for name, ratio in self.shares.items() if not ratio)
            raise UserError(
                f"{option} trains on some of every source, but --selection.shares gives {without} no quota: leave one "
                f"out"
            )
        if self.method in ("colm", "stratified") and self.coverage_floor * self.candidates > self.budget:
            raise UserError(
                f"{option} asks for more than --selection.budget {self.budget} of --selection.candidates "
                f"{self.candidates} can give: give at most {self.budget / self.candidates:.6g}, or a larger budget"
            )

    def _check_ranking(self) -> None:
        """What goes with which ranking."""
        if self.weights == "cluster" and self.ranking != "facility":
            raise UserError(
                f"--selection.weights cluster counts what a medoid stands for, and --selection.ranking {self.ranking} "
                f"picks none: give --selection.ranking facility, or --selection.weights unbiased"
            )
        if self.candidates > MOST_COMPARED and self.ranking == "matching":
            raise UserError(
                f"--selection.candidates {self.candidates} are too many to compare each with each other, as "
                f"--selection.ranking matching does: give at most {MOST_COMPARED}, or --selection.ranking facility"
            )

    @property
    def sketches(self) -> bool:
        """Whether the method compares candidates by sketches."""
        return self.method == "colm"

    def check_own(self) -> None:
        """Load the functions of the user's that the method uses.

        Raises:
            UserError: One cannot be loaded, or is none.
        """
        if self.method == "colm":
            for option, name, parameters in (("estimator", self.estimator, 2), ("ranking", self.ranking, 1)):
                if own.is_own(name):
                    own.load_own(f"selection.{option}", name, parameters)

    def resolved(self) -> SelectionConfig:
        """With the preset written out, and a file of shares read.

        Raises:
            UserError: The file cannot be read, or does not hold ratios.
        """
        if self.preset == "none":
            return dataclasses.replace(self, shares=read_shares(str(self.shares))) if is_file(self.shares) else self
        return dataclasses.replace(
            self,
            preset="none",
            estimator="zeroth_order",
            ranking="facility",
            shares="proportional",
            num_probes=1,
            columns=2560,
            compression="columns",
            metric="l1",
            weights="uniform",
            probe="v",
            reuse=0,
        )


def _require_part(option: str, name: str, parts: Any) -> None:
    known = get_args(parts)
    expected = f"one of {', '.join(known)}, or a function of yours ({own.FORM})"
    require(name in known or own.is_own(name), f"selection.{option}", name, expected)
