"""The options of the selection."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from colm_scale.config import user_functions as own
from colm_scale.config.checks import require, require_least
from colm_scale.config.rules import SELECTION, check
from colm_scale.config.shares import Shares, is_file, parse_shares, read_shares

Method = Literal["colm", "stratified", "random", "full", "replay"]
EstimatorName = Literal["last_layer", "zeroth_order", "length"]
Ranking = Literal["matching", "facility", "systematic"]
Metric = Literal["l1", "l2", "cosine"]
Weights = Literal["uniform", "cluster", "unbiased"]


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Selection of the coreset."""

    method: Method = "colm"
    """colm: kept sources, quotas, and picks ranked by gradient sketches. stratified: the same kept sources and
    quotas, with random picks. random: a uniform draw. full: every candidate, in accumulated micro-batches. replay: the
    selections that another run has recorded."""
    replay: str | None = None
    """Folder of the run to replay, or its selection.jsonl."""
    preset: Literal["none", "paper"] = "none"
    """paper: one zeroth-order probe, facility location, L1, h=2560, uniform weights, eps 1e-3 (arXiv 2407.19580);
    overrides the options below."""
    candidates: int = 64
    """Candidates per optimizer step, over all ranks (n)."""
    budget: int = 32
    """Size of the coreset per optimizer step, over all ranks (b)."""
    estimator: EstimatorName | str = "last_layer"
    """Sketch of a candidate. last_layer: exact gradient of the probe tensor. zeroth_order: its derivatives along
    `num_probes` random directions. length: the number of tokens, without a forward. Or your own function,
    FILE.py:FUNCTION or MODULE:FUNCTION (docs/CONTRIBUTING.md)."""
    ranking: Ranking | str = "matching"
    """Choice of the picks that fill a source's quota. matching: the subset whose mean gradient is nearest to the
    candidates', by swaps, making up for the errors of earlier steps. facility: medoids that represent all candidates
    (the paper's). systematic: sort by one score and take every n-th. Or your own function, FILE.py:FUNCTION or
    MODULE:FUNCTION (docs/CONTRIBUTING.md)."""
    shares: Shares = "proportional"
    """Division of the budget among the sources that are not kept, for colm and stratified. proportional: to their
    candidates (the paper's). equal: the same for each. A number: to their training examples raised to that power (1:
    their size, 0: equal). Or your own ratios, '{math: 3, code: 1}', or a .yaml or .json file with them; every source
    that is not kept needs one, and 0 means no quota."""
    coverage_floor: float = 0.0
    """colm and stratified: train on at least this share of each source's candidates, over any stretch of steps and so
    in every pass over the data; later steps make up for what one step lacks. At most budget / candidates. 0: none."""
    num_probes: int = 1
    """Random directions of the zeroth-order estimator (K)."""
    columns: int = 512
    """Numbers compared per candidate (h)."""
    compression: Literal["columns", "countsketch"] = "countsketch"
    """last_layer: reduction of the gradient to `columns` numbers. countsketch: a random projection of the update, one
    sign and place per number. columns: the entries with the largest mean update, per source (the paper's); since these
    change from step to step, matching then looks at each step alone."""
    metric: Metric = "l1"
    """Distance between sketches, for facility location; matching compares means by L2."""
    weights: Weights = "uniform"
    """Weight of a coreset example. uniform: 1 (the paper's). cluster (facility only): the number of candidates it
    represents. unbiased: a source's picks represent all its candidates, in equal parts. If the picks are drawn
    (systematic, stratified) and every source has a quota, the expected gradient is then that of all candidates. A kept
    example counts 1."""
    kept_sources: float | list[str] | None = None
    """Sources whose candidates are all trained on. Default: those with fewer examples than the average source (the
    paper's). A number in [0, 1]: that share of the sources, the smallest ones. Names: these; `[]`: none."""
    overflow: Literal["subset", "fail"] = "subset"
    """If the kept candidates exceed the budget: train on a uniform draw of them (subset), or end the run (fail)."""
    probe: str = "v"
    """Linear layer whose LoRA B matrix is the probe: v, q, k, o (of the attention) or mlp (its last layer), recognised
    by their function, or a layer's name."""
    reuse: int = 0
    """Reuse an example's sketch for up to this many steps; with as many as the run has, later epochs sketch nothing. 0:
    every sketch is new. Not with --selection.compression columns."""

    def __post_init__(self) -> None:
        _require_part("estimator", self.estimator, EstimatorName)
        _require_part("ranking", self.ranking, Ranking)
        require_least(self, "selection.", candidates=1, budget=1, num_probes=1, columns=1, reuse=0)
        most = f"at most --selection.candidates ({self.candidates})"
        require(self.budget <= self.candidates, "selection.budget", self.budget, most)
        object.__setattr__(self, "shares", parse_shares(self.shares))
        require(0 <= self.coverage_floor <= 1, "selection.coverage_floor", self.coverage_floor, "in [0, 1]")
        if isinstance(self.kept_sources, (int, float)):
            require(0 <= self.kept_sources <= 1, "selection.kept_sources", self.kept_sources, "in [0, 1], or names")
        check(self, SELECTION)

    @property
    def own_parts(self) -> bool:
        """True if no preset overrides the parts of the selection."""
        return self.preset == "none"

    @property
    def sketches(self) -> bool:
        """True if the method compares candidates by sketches."""
        return self.method == "colm"

    def feedback_columns(self, size: int) -> int:
        """Columns in which matching makes up for earlier errors; 0 where a column is another one in each step.

        Args:
            size: Numbers in the gradient of the probe tensor.
        """
        matches = self.sketches and self.own_parts and self.ranking == "matching"
        steady = self.estimator == "last_layer" and self.compression == "countsketch"
        return min(self.columns, size) if matches and steady else 0

    def check_own(self) -> None:
        """Load the user's own functions that the method uses.

        Raises:
            UserError: One cannot be loaded, or is not a function.
        """
        if self.method == "colm":
            for option, name, parameters in (("estimator", self.estimator, 2), ("ranking", self.ranking, 1)):
                if own.is_own(name):
                    own.load_own(f"selection.{option}", name, parameters)

    def resolved(self) -> SelectionConfig:
        """Expand the preset, and read a file of shares.

        Raises:
            UserError: The file cannot be read, or does not contain ratios.
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
    expected = f"one of {', '.join(known)}, or your own function ({own.FORM})"
    require(name in known or own.is_own(name), f"selection.{option}", name, expected)
