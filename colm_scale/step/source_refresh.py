"""Sources that follow the model: hidden states pass by anyway, and every so many steps they are clustered anew.

The mean last hidden state of every candidate that the trained model forwards, in the sketch or in the training of the
coreset, is projected to a few numbers by a matrix that is fixed for the run. So kept sources, which are not sketched,
are known from training; without a sketch, the coreset is all that is known. After
``--sources.refresh_every`` steps the first rank clusters what was seen since the last time, when the states were nearly
those of the model now, and tells the others who has moved. An example that was not seen stays where it is.

Bytes a step moves, with p numbers a state: 4 n (p + 1).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from colm_scale.clustering.cluster import regroup
from colm_scale.config import RunConfig
from colm_scale.distributed.group import Group
from colm_scale.modeling.embedding import mean_states
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.randomness import generator
from colm_scale.records import Batch, Candidates, Json, long_tensor
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.shares import source_shares
from colm_scale.step.source_state import SourceState

DIMENSIONS = 64
"""Numbers that are kept of an example's mean hidden state, a random projection."""


class _Changes(TypedDict):
    """Of how many examples, each that moved as its id, old and new source, and the sources that are new."""

    examples: int
    moved: list[list[int]]
    new: list[int]


@dataclass(frozen=True, slots=True)
class Drift:
    """What a refresh has found: a row of a run's drift.jsonl.

    Attributes:
        step: After which it was made.
        examples: How many were clustered, all that were seen since the last time.
        moved: How many of them now are of another source.
        new: Sources most of whose examples were of another one before.
        kept, no_longer_kept: Sources that the rule keeps from now on, and those that it has kept so far.
        sizes: Training examples of each source by name, as far as is known.
        seconds: What it took.
    """

    step: int
    examples: int
    moved: int
    new: list[str]
    kept: list[str]
    no_longer_kept: list[str]
    sizes: dict[str, int]
    seconds: float


class SourceRefresh(Protocol):
    """Knows each example's source as it is now. Equal on every rank."""

    def relabelled(self, candidates: Candidates) -> Candidates:
        """The candidates of a step with their sources of now."""

    def watching(self) -> AbstractContextManager[None]:
        """A block whose forwards of the model are looked at."""

    def gather(self, candidates: Candidates) -> None:
        """Put together what all ranks have seen in a step. All ranks call it together."""

    def __call__(self, step: int, state: SourceState) -> Drift | None:
        """Re-cluster after a step if that is due, and renew the ``state``. All ranks call it together."""

    def state(self) -> dict[str, Tensor]:
        """What is known, on the first rank; part of a checkpoint."""

    def load(self, saved: Mapping[str, Tensor] | None, state: SourceState) -> None:
        """Go on from the first rank's `state`; the others pass None. All ranks call it together.

        Args:
            state: Of the sources, already restored; it gets the shares of now.
        """


class FixedSources(SourceRefresh):
    """Leaves every example in the source that the data gives it."""

    def relabelled(self, candidates: Candidates) -> Candidates:
        return candidates

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, candidates: Candidates) -> None:
        """Nothing was looked at."""

    def __call__(self, step: int, state: SourceState) -> Drift | None:
        return None

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, saved: Mapping[str, Tensor] | None, state: SourceState) -> None:
        """There is nothing to go on from."""


class ReclusteredSources(SourceRefresh):
    """Clusters the examples again every so many steps, by the hidden states that passed by in training.

    Args:
        module: The model that is trained, before or after an engine has wrapped it.
        names, sizes, kept: ``[Q]`` of the sources as they are at first.

    Attributes:
        sizes: ``[Q]`` int64 training examples of each source.
        kept: ``[Q]`` bool, the sources that the rule keeps.
    """

    def __init__(
        self,
        config: RunConfig,
        module: ExampleLoss,
        names: Sequence[str],
        sizes: Tensor,
        kept: Tensor,
        group: Group,
    ):
        self.sizes, self.kept = sizes.clone(), kept
        self._config, self._module, self._names, self._group = config, module, tuple(names), group
        self._moved: dict[int, int] = {}
        self._seen: dict[int, tuple[int, Tensor]] = {}  # on the first rank: source and state of examples, by id
        width = module.causal_model.get_output_embeddings().in_features
        draws = generator(config.train.seed, "sources")
        self._projection = torch.randn(width, DIMENSIONS, generator=draws).to(group.device)
        self._local = torch.zeros(0)

    @property
    def shares(self) -> Tensor | None:
        return source_shares(self._config.selection.shares, self._names, self.sizes)

    def relabelled(self, candidates: Candidates) -> Candidates:
        self._local = torch.zeros(len(candidates), DIMENSIONS + 1, device=self._group.device)
        pairs = zip(candidates.ids.tolist(), candidates.sources.tolist())
        return replace(candidates, sources=long_tensor([self._moved.get(id_, source) for id_, source in pairs]))

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._module.on_hidden = self._see
        try:
            yield
        finally:
            self._module.on_hidden = None

    def gather(self, candidates: Candidates) -> None:
        seen = self._group.all_reduce(self._local, "sources").cpu()
        self._local = torch.zeros(0)
        if self._group.is_first:
            for position in seen[:, -1].nonzero().flatten().tolist():
                # Seen twice, in the sketch and in training, it is the same but for rounding.
                state = seen[position, :-1] / seen[position, -1]
                self._seen.pop(int(candidates.ids[position]), None)
                self._seen[int(candidates.ids[position])] = int(candidates.sources[position]), state

    def __call__(self, step: int, state: SourceState) -> Drift | None:
        every = self._config.sources.refresh_every
        if step % every:
            return None
        started = time.perf_counter()
        found: _Changes | None = None
        with self._group.together():
            if self._group.is_first:
                found = self._regrouped(step)
        shared = self._group.share_json(found)
        for id_, before, now in shared["moved"]:
            self._moved[id_] = now
            self.sizes[before] -= 1
            self.sizes[now] += 1
        kept_before = self.kept
        self.kept = kept_sources(self.sizes, self._names, self._config.selection.kept_sources)
        self._seen = {}
        state.renew(self.kept, self.shares)
        return Drift(
            step=step,
            examples=shared["examples"],
            moved=len(shared["moved"]),
            new=[self._names[source] for source in shared["new"]],
            kept=self._named(self.kept & ~kept_before),
            no_longer_kept=self._named(kept_before & ~self.kept),
            sizes=dict(zip(self._names, self.sizes.tolist())),
            seconds=time.perf_counter() - started,
        )

    def state(self) -> dict[str, Tensor]:
        states = [state for _, state in self._seen.values()]
        return {
            "sizes": self.sizes.clone(),
            "moved": long_tensor([*chain.from_iterable(self._moved.items())]).view(-1, 2),
            "ids": long_tensor([*self._seen]),
            "sources": long_tensor([source for source, _ in self._seen.values()]),
            "states": torch.stack(states) if states else torch.zeros(0, DIMENSIONS),
        }

    def load(self, saved: Mapping[str, Tensor] | None, state: SourceState) -> None:
        plain: Json | None = None if saved is None else {name: saved[name].tolist() for name in ("sizes", "moved")}
        shared = self._group.share_json(plain)
        self.sizes, self._moved = long_tensor(shared["sizes"]), dict(shared["moved"])
        self.kept, state.shares = state.kept, self.shares
        if saved is not None:
            rows = zip(saved["ids"].tolist(), saved["sources"].tolist(), saved["states"])
            self._seen = {id_: (source, state.clone()) for id_, source, state in rows}

    def _see(self, batch: Batch, hidden: Tensor) -> None:
        if len(batch.positions):
            found = mean_states(batch, hidden)[: len(batch.positions)] @ self._projection
            self._local[batch.positions.to(found.device)] += torch.cat([found, torch.ones_like(found[:, :1])], dim=1)

    def _regrouped(self, step: int) -> _Changes:
        """What has become of the examples that were seen, as plain JSON."""
        ids = [id_ for id_, (_, state) in self._seen.items() if state.isfinite().all()]
        before = np.array([self._seen[id_][0] for id_ in ids], np.int64)
        if not ids:
            return {"examples": 0, "moved": [], "new": []}
        states = torch.stack([self._seen[id_][1] for id_ in ids]).numpy()
        seed = int(generator(self._config.train.seed, "regroup", step).initial_seed() % 2**32)
        found = regroup(states, before, seed)
        moved = (found.sources != before).nonzero()[0].tolist()
        changes = [[ids[place], int(before[place]), int(found.sources[place])] for place in moved]
        return {"examples": len(ids), "moved": changes, "new": [*found.new]}

    def _named(self, which: Tensor) -> list[str]:
        return [self._names[source] for source in which.nonzero().flatten().tolist()]
