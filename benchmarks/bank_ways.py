"""Ways to select from the examples of a gradient bank.

The package's own rules, estimators and rankings run on what the bank holds: the probe's gradients, losses and lengths.
Other rows to compare by (hidden states, words, gradients of all adapters) go to its rankings as they are. A derivative
along a random direction is the exact one, without a finite difference's rounding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import arms
import torch
from torch import Tensor

from colm_scale.config import SelectionConfig, TrainConfig
from colm_scale.distributed.connect import connect
from colm_scale.estimators.base import Estimator
from colm_scale.estimators.make import make_estimator
from colm_scale.estimators.zeroth_order import ZerothOrder
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, Selection, SketchPlan, long_tensor
from colm_scale.selection.feedback import ErrorFeedback
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.rule import SelectionRule, loss_shares
from colm_scale.sketch import zeroth_order
from colm_scale.sketch.plan import plan_sketch

WARM_UP = 10
"""Draws that only update an estimator's moments."""
SETTINGS: Mapping[str, dict[str, Any]] = {"none kept": {"kept_sources": []}, "kept": {}}
"""Without kept sources, all quotas in proportion to the candidates; and with the default's."""


@dataclass(frozen=True)
class Way:
    """A way to select.

    Attributes:
        options: Of the selection.
        rows: What candidates are compared by, a name in `Pool.rows`; empty for the rows of the estimator.
        together: Rank the candidates of all sources together, without quotas.
        feedback: Make up for the errors of the draws before, as the steps of a run do.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    rows: str = ""
    together: bool = False
    feedback: bool = False


def ranked(ranking: str, weights: str = "uniform", **options: Any) -> Way:
    """A ranking by an estimator of the package, by default on columns."""
    return Way({"ranking": ranking, "weights": weights, "compression": "columns"} | options)


def matched(rows: str, weights: str = "uniform", *, together: bool = False) -> Way:
    """Matching on the bank's own rows."""
    return Way({"ranking": "matching", "weights": weights}, rows, together)


_SKETCH = {"compression": "countsketch"}
_FACILITY = {"ranking": "facility", "metric": "l2"}
WAYS: Mapping[str, Way] = {
    "random": Way({"method": "random"}),
    "stratified": Way({"method": "stratified"}),
    "stratified, unbiased": Way({"method": "stratified", "weights": "unbiased"}),
    "last_layer columns; facility": ranked("facility"),
    "last_layer columns; facility, cluster weights": ranked("facility", "cluster"),
    "last_layer columns; matching": ranked("matching"),
    "last_layer columns; matching, unbiased": ranked("matching", "unbiased"),
    "last_layer columns; balanced": ranked(arms.own("balanced")),
    "last_layer columns; systematic": ranked("systematic"),
    "last_layer countsketch; facility": ranked("facility", **_SKETCH),
    "last_layer countsketch; matching": ranked("matching", **_SKETCH),
    "last_layer countsketch; matching, unbiased": ranked("matching", "unbiased", **_SKETCH),
    "last_layer countsketch; matching, with feedback": Way({"ranking": "matching", **_SKETCH}, feedback=True),
    "zeroth_order, K=1; facility": ranked("facility", estimator="zeroth_order", columns=2560),
    "zeroth_order, K=16; facility": ranked("facility", estimator="zeroth_order", columns=2560, num_probes=16),
    "zeroth_order, K=16; matching": ranked("matching", estimator="zeroth_order", columns=2560, num_probes=16),
    "loss; systematic": ranked("systematic", estimator=arms.LOSS),
    "length; systematic": ranked("systematic", estimator="length"),
    "probe; facility": Way({"ranking": "facility"}, "probe"),
    "probe; matching": matched("probe"),
    "probe; matching, unbiased": matched("probe", "unbiased"),
    "probe and source, together; facility": Way(_FACILITY, "probe and source", together=True),
    "probe and source, together; matching": matched("probe and source", together=True),
    "last block; matching": matched("last block"),
    "middle block; matching": matched("middle block"),
    "all adapters; facility": Way(_FACILITY, "all"),
    "all adapters; matching": matched("all"),
    "all adapters, scaled; matching": matched("scaled"),
    "words; matching": matched("words"),
    "words; matching, unbiased": matched("words", "unbiased"),
    "words and source, together; matching": matched("words and source", together=True),
    "words; facility": Way(_FACILITY, "words"),
    **{f"hidden states {depth}; matching": matched(f"hidden states {depth}") for depth in range(1, 7)},
}
ALL = "all candidates"
"""Trains on all candidates; the bound of every way."""
DEPTHS = 6
"""Depths at which hidden states are kept, the last block's output among them."""


class StoredTap:
    """The probe's gradients and the losses of a pool, in place of a tap on a model."""

    def __init__(self, probe: Tensor, losses: Tensor, shape: tuple[int, int]):
        self.probe, self.losses, self.shape, self.size = probe, losses, shape, probe.shape[1]

    def factors(self, batch: Stored) -> tuple[Tensor, Tensor, Tensor]:
        """As `Tap.factors`: the gradient times the identity."""
        gradients = self.probe[batch.places].view(-1, *self.shape).transpose(1, 2)
        return self.losses[batch.places], gradients, torch.eye(self.shape[1]).expand(len(gradients), -1, -1)

    def bare_losses(self, batch: Stored) -> Tensor:
        return self.losses[batch.places]


@dataclass(frozen=True)
class Stored:
    """A micro-batch of examples of the pool: positions among the candidates, and places in the pool."""

    positions: Tensor
    places: Tensor

    @property
    def lengths(self) -> list[int]:
        return self.places.tolist()


class Derivatives(ZerothOrder):
    """Exact derivatives along the directions, from stored gradients."""

    def sketch(self, plan: SketchPlan, batches: list[Stored]) -> None:
        self._plan = plan
        places = torch.cat([long_tensor([]), *(batch.places for batch in batches)])
        along = self._tap.probe[places] @ self._directions.T
        self._local = torch.cat([along, self._tap.losses[places].unsqueeze(1)], dim=1)


class Pool:
    """The examples of a bank in one state of the model.

    Attributes:
        step: Training steps before it.
        about: What bank.json says.
        products: ``{plain: {all, block 0, ..., probe}, scaled: {all, block 0, ...}}``, each ``[N, N]`` float64.
        rows: ``{name: [N, h]}`` to compare candidates by.
        tap: For the package's estimators.
    """

    def __init__(self, bank: Path, step: int):
        self.step = step
        self.about = about = json.loads((bank / "bank.json").read_text(encoding="utf-8"))
        self.group, self.train = connect(), TrainConfig()
        self.lengths, self.labels = long_tensor(about["lengths"]), long_tensor(about["labels"])
        self.sources, self.ids = long_tensor(about["sources"]), long_tensor(about["ids"])
        self.sizes, self.names = long_tensor(about["sizes"]), tuple(about["source_names"])
        folder = bank / f"step-{step}"
        stored = torch.load(folder / "products.pt", weights_only=True)
        self.products = {kind: {name: p.double() for name, p in of.items()} for kind, of in stored.items()}
        self.tap = self.tap_of(folder)
        self.rows = self._rows(folder, torch.load(bank / "words.pt", weights_only=True))

    def __len__(self) -> int:
        return len(self.ids)

    def tap_of(self, folder: Path) -> StoredTap:
        """The probe in this or another state."""
        shape = tuple(self.about["probe"])
        probe, losses = read(folder / "probe", len(self), -1), read(folder / "losses", len(self))
        return StoredTap(probe, losses, shape)

    def _rows(self, folder: Path, words: Tensor) -> dict[str, Tensor]:
        plain = self.products["plain"]
        last = len([name for name in plain if name.startswith("block")]) - 1
        source = torch.nn.functional.one_hot(self.sources, len(self.names)).float()
        states = read(folder / "states", len(self), len(depths(last + 1)), -1)
        found = {
            "probe": self.tap.probe,
            "probe and source": torch.cat([of_length_one(self.tap.probe), source], dim=1),
            "last block": rows_of(plain[f"block {last}"]),
            "middle block": rows_of(plain[f"block {last // 2}"]),
            "all": rows_of(plain["all"]),
            "scaled": rows_of(self.products["scaled"]["all"]),
            "words": words,
            "words and source": torch.cat([words, source], dim=1),
        }
        states = (states - states.mean(0)) / states.std(0)  # a few dimensions are larger than all others
        found |= {f"hidden states {number}": of_depth for number, of_depth in enumerate(states.unbind(1), 1)}
        return found

    def estimator(self, config: SelectionConfig, tap: StoredTap) -> Estimator:
        """The package's estimator on stored gradients."""
        made = make_estimator(tap, config, self.train, self.group)
        if not isinstance(made, ZerothOrder):
            return made
        directions = zeroth_order.probes(self.train.seed, config.num_probes, tap.size, self.group.device)
        return Derivatives(tap, self.group, made.moments, directions, config.columns)

    def draw(self, number: int, n: int) -> tuple[Tensor, Candidates]:
        """Places in the pool, and the candidates, of a draw: the same for every way."""
        places = torch.randperm(len(self), generator=generator(self.train.seed, "draw", n, number))[:n]
        return places, Candidates(number + 1, places, self.ids[places], self.sources[places], self.lengths[places])

    def weights(self, way: Way, setting: str, n: int, b: int, draws: int, tap: StoredTap | None = None) -> Tensor:
        """``[draws, N]`` weight of each example in the coreset of each draw.

        Args:
            tap: Of another state, for the sketches of an estimator.
        """
        config = SelectionConfig(candidates=n, budget=b, **SETTINGS[setting] | way.options)
        kept = kept_sources(self.sizes, self.names, config.kept_sources)
        rule = SelectionRule(config, torch.tensor([False]) if way.together else kept, self.train.seed)
        ranks = config.method == "colm"
        estimator = self.estimator(config, tap or self.tap) if ranks and not way.rows else None
        warm_up = WARM_UP if estimator else 0
        found = torch.zeros(warm_up + draws, len(self), dtype=torch.float64)
        columns = config.feedback_columns(self.tap.size) if way.feedback else 0
        feedback = ErrorFeedback.beginning(len(self.names), columns)
        for number in range(-warm_up, draws):
            places, candidates = self.draw(number % 2**20, n)
            if way.together:
                candidates = replace(candidates, sources=torch.zeros_like(candidates.sources))
            if estimator:
                chosen, matrix = self._by_estimator(rule, estimator, candidates, places, feedback)
                feedback = feedback.after(matrix, candidates.sources, chosen)
            else:
                chosen = self._by_rows(rule, self.rows[way.rows] if ranks else torch.zeros(len(self), 1), candidates)
            shares = loss_shares(chosen, self.labels[places[chosen.positions]], self.train.loss)
            found[number + warm_up, places[chosen.positions]] = shares.double()
        return found[warm_up:]

    def _by_rows(self, rule: SelectionRule, rows: Tensor, candidates: Candidates) -> Selection:
        quota = rule.quota(candidates)
        positions = quota.to_sketch(candidates.sources)
        of = rows[candidates.indices[positions]]
        matrix = CandidateMatrix(positions, of, torch.ones(len(of), dtype=torch.bool), torch.zeros(len(of)))
        return rule.select(candidates, quota, matrix)

    def _by_estimator(
        self,
        rule: SelectionRule,
        estimator: Estimator,
        candidates: Candidates,
        places: Tensor,
        feedback: ErrorFeedback,
    ) -> tuple[Selection, CandidateMatrix]:
        """Select as `CoresetStep` does, on one rank."""
        quota = rule.quota(candidates)
        known = estimator.known(candidates)
        plan = plan_sketch(candidates, quota, 1, int(self.lengths.sum()), known)  # rows do not depend on micro-batches
        estimator.sketch(plan, [Stored(at, places[at]) for at in map(long_tensor, plan.shares[0])])
        matrix = estimator.gather()
        selection = rule.select(candidates, quota, matrix, feedback)
        estimator.learn(selection)
        return selection, matrix


def read(path: Path, *shape: int) -> Tensor:
    """A float32 array of the bank."""
    return torch.from_file(str(path.with_suffix(".f32")), size=path.with_suffix(".f32").stat().st_size // 4).view(shape)


def depths(blocks: int) -> list[int]:
    """Blocks whose outputs are kept."""
    return sorted({(depth + 1) * blocks // DEPTHS - 1 for depth in range(DEPTHS)} - {-1})


def rows_of(products: Tensor) -> Tensor:
    """``[N, N]`` rows with these inner products: all that a rotation-invariant ranking needs to know."""
    values, vectors = torch.linalg.eigh(products)
    return (vectors * values.clamp(min=0).sqrt()).float()


def of_length_one(rows: Tensor) -> Tensor:
    """Rows with a mean square length of 1."""
    return rows / rows.square().sum(1).mean().sqrt()
