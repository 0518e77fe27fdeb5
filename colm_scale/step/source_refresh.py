"""Re-clustering of the sources during a run, from hidden states that the run computes anyway.

The mean last hidden state of every candidate that the model forwards, in the sketch or in training, is projected to a
few numbers by a matrix that is fixed for the run. Kept sources are not sketched, so their states come from training;
without a sketch, all states do. Every ``--sources.refresh_every`` steps the first rank clusters the examples seen since
the last refresh and sends the other ranks the changes. An example that was not seen stays in its source.

Bytes exchanged per step, with p numbers per state: 4 n (p + 1).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from colm_scale.clustering.cluster import regroup
from colm_scale.config import SelectionConfig
from colm_scale.distributed.group import Group
from colm_scale.modeling.embedding import mean_states
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.randomness import generator
from colm_scale.records import Batch, Candidates, Json, long_tensor, on_device
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.shares import source_shares
from colm_scale.step.source_state import SourceState

DIMENSIONS = 64
"""Size of an example's projected mean hidden state."""


@dataclass(frozen=True, slots=True)
class Drift:
    """The result of a re-clustering: a row of a run's drift.jsonl.

    Attributes:
        step: The step after which it was made.
        examples: Number of clustered examples: all those seen since the last one.
        moved: Number of examples that changed source.
        new: Sources most of whose examples had another source before.
        kept: Sources that have become kept.
        no_longer_kept: Sources that are not kept any more.
        sizes: Training examples of each source by name, as far as known.
        seconds: Its duration.
    """

    step: int
    examples: int
    moved: int
    new: list[str]
    kept: list[str]
    no_longer_kept: list[str]
    sizes: dict[str, int]
    seconds: float


class SourceRefresh:
    """Keeps track of each example's current source. The base class never re-clusters. Equal on every rank."""

    def relabelled(self, candidates: Candidates) -> Candidates:
        """The candidates of a step with their current sources."""
        return candidates

    def watching(self) -> AbstractContextManager[None]:
        """A context in which the hidden states of every forward are recorded."""
        return nullcontext()

    def gather(self, candidates: Candidates) -> None:
        """Combine the states that all ranks have recorded in a step. All ranks call it together."""

    def __call__(self, step: int, state: SourceState) -> Drift | None:
        """Re-cluster after a step if due, and renew ``state``. All ranks call it together."""
        return None

    def state(self) -> dict[str, Tensor]:
        """The first rank's part of a checkpoint."""
        return {}

    def load(self, saved: Mapping[str, Tensor] | None, state: SourceState) -> None:
        """Continue from the first rank's `state`; the other ranks pass None. All ranks call it together.

        Args:
            state: Kept sources, already restored; its shares are set.
        """


class SeenStates:
    """Records the projected hidden states of the candidates since the last re-clustering.

    Args:
        module: The trained model, before or after an engine has wrapped it.
        seed: Seed of the run, for the projection (equal on every rank) and the clustering.
    """

    def __init__(self, module: ExampleLoss, seed: int, group: Group):
        self.group = group
        self._module, self._seed = module, seed
        width = module.causal_model.get_output_embeddings().in_features
        self._projection = torch.randn(width, DIMENSIONS, generator=generator(seed, "sources")).to(group.device)
        self._local = torch.zeros(0)
        self._by_id: dict[int, tuple[int, Tensor]] = {}  # source and state, on the first rank

    def begin(self, candidates: int) -> None:
        """Make room for the states of a step's candidates: ``[n, p + 1]``, the last column a count."""
        self._local = torch.zeros(candidates, DIMENSIONS + 1, device=self.group.device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._module.watchers.append(self._record)
        try:
            yield
        finally:
            self._module.watchers.remove(self._record)

    def gather(self, candidates: Candidates) -> None:
        seen = self.group.all_reduce(self._local, "sources").cpu()
        self._local = torch.zeros(0)
        if self.group.is_first:
            for position in seen[:, -1].nonzero().flatten().tolist():
                # States from the sketch and from training are equal except for rounding.
                state = seen[position, :-1] / seen[position, -1]
                self._by_id.pop(int(candidates.ids[position]), None)
                self._by_id[int(candidates.ids[position])] = int(candidates.sources[position]), state

    def cluster(self, step: int) -> Json:
        """Cluster the recorded examples on the first rank, and forget their states. All ranks call it together.

        Returns:
            ``examples``, their number; ``moved``, the id, old and new source of each that moved; ``new`` sources.
        """
        changes: Json = {}
        with self.group.together():
            if self.group.is_first:
                changes = self._changes(step)
        self._by_id = {}
        return self.group.share_json(changes)

    def state(self) -> dict[str, Tensor]:
        """The first rank's part of a checkpoint."""
        states = [state for _, state in self._by_id.values()]
        return {
            "ids": long_tensor([*self._by_id]),
            "sources": long_tensor([source for source, _ in self._by_id.values()]),
            "states": torch.stack(states) if states else torch.zeros(0, DIMENSIONS),
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from a `state`, on the first rank."""
        rows = zip(saved["ids"].tolist(), saved["sources"].tolist(), saved["states"])
        self._by_id = {id_: (source, state.clone()) for id_, source, state in rows}

    def _record(self, batch: Batch, hidden: Tensor) -> None:
        if len(batch.positions):
            found = mean_states(batch, hidden)[: len(batch.positions)] @ self._projection
            at = on_device(batch.positions, found.device)
            self._local[at] += torch.cat([found, torch.ones_like(found[:, :1])], dim=1)

    def _changes(self, step: int) -> Json:
        ids = [id_ for id_, (_, state) in self._by_id.items() if state.isfinite().all()]
        before = np.array([self._by_id[id_][0] for id_ in ids], np.int64)
        if not ids:
            return {"examples": 0, "moved": [], "new": []}
        states = torch.stack([self._by_id[id_][1] for id_ in ids]).numpy()
        seed = int(generator(self._seed, "regroup", step).initial_seed() % 2**32)
        found = regroup(states, before, seed)
        places = (found.sources != before).nonzero()[0].tolist()
        moved = [[ids[place], int(before[place]), int(found.sources[place])] for place in places]
        return {"examples": len(ids), "moved": moved, "new": [*found.new]}


class ReclusteredSources(SourceRefresh):
    """Re-clusters the examples at a fixed interval, by the hidden states recorded in between.

    Args:
        seen: Records the hidden states.
        names, sizes, kept: ``[Q]`` initial table of the sources.
        refresh_every: Interval in steps.

    Attributes:
        sizes: ``[Q]`` int64 training examples of each source.
        kept: ``[Q]`` bool, the kept sources.
    """

    def __init__(
        self,
        seen: SeenStates,
        names: Sequence[str],
        sizes: Tensor,
        kept: Tensor,
        selection: SelectionConfig,
        refresh_every: int,
    ):
        self.sizes, self.kept = sizes.clone(), kept
        self._seen, self._names, self._selection, self._every = seen, tuple(names), selection, refresh_every
        self._moved: dict[int, int] = {}  # current source of every example that ever moved, by id

    @property
    def shares(self) -> Tensor | None:
        return source_shares(self._selection.shares, self._names, self.sizes)

    def relabelled(self, candidates: Candidates) -> Candidates:
        self._seen.begin(len(candidates))
        pairs = zip(candidates.ids.tolist(), candidates.sources.tolist())
        return replace(candidates, sources=long_tensor([self._moved.get(id_, source) for id_, source in pairs]))

    def watching(self) -> AbstractContextManager[None]:
        return self._seen.watching()

    def gather(self, candidates: Candidates) -> None:
        self._seen.gather(candidates)

    def __call__(self, step: int, state: SourceState) -> Drift | None:
        if step % self._every:
            return None
        started = time.perf_counter()
        changes = self._seen.cluster(step)
        for id_, before, now in changes["moved"]:
            self._moved[id_] = now
            self.sizes[before] -= 1
            self.sizes[now] += 1
        kept_before = self.kept
        self.kept = kept_sources(self.sizes, self._names, self._selection.kept_sources)
        state.renew(self.kept, self.shares)
        return Drift(
            step=step,
            examples=changes["examples"],
            moved=len(changes["moved"]),
            new=[self._names[source] for source in changes["new"]],
            kept=self._named(self.kept & ~kept_before),
            no_longer_kept=self._named(kept_before & ~self.kept),
            sizes=dict(zip(self._names, self.sizes.tolist())),
            seconds=time.perf_counter() - started,
        )

    def state(self) -> dict[str, Tensor]:
        moved = long_tensor([*chain.from_iterable(self._moved.items())]).view(-1, 2)
        return {"sizes": self.sizes.clone(), "moved": moved, **self._seen.state()}

    def load(self, saved: Mapping[str, Tensor] | None, state: SourceState) -> None:
        table: Json | None = None
        if saved is not None:
            table = {name: saved[name].tolist() for name in ("sizes", "moved")}
            self._seen.load(saved)
        shared = self._seen.group.share_json(table)
        self.sizes, self._moved = long_tensor(shared["sizes"]), dict(shared["moved"])
        self.kept, state.shares = state.kept, self.shares

    def _named(self, which: Tensor) -> list[str]:
        return [self._names[source] for source in which.nonzero().flatten().tolist()]
