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

import torch
from torch import Tensor

from colm_scale.clustering.cluster import regroup
from colm_scale.config import SelectionConfig
from colm_scale.distributed.group import Group
from colm_scale.modeling.embedding import mean_states
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.randomness import generator
from colm_scale.records import Batch, Candidates, Json, last_of_each, long_tensor, on_device
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


@dataclass(frozen=True, slots=True)
class _States:
    """Projected hidden states ``[k, p]`` of some examples, with their ``[k]`` ids and sources."""

    ids: Tensor
    sources: Tensor
    states: Tensor

    def at(self, which: Tensor) -> _States:
        return _States(self.ids[which], self.sources[which], self.states[which])


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
        self._seen: list[_States] = []  # by step, on the first rank

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
            positions = seen[:, -1].nonzero().flatten()
            # States from the sketch and from training are equal except for rounding.
            states = seen[positions, :-1] / seen[positions, -1:]
            self._seen.append(_States(candidates.ids[positions], candidates.sources[positions], states))

    def cluster(self, step: int) -> Json:
        """Cluster the recorded examples on the first rank, and forget their states. All ranks call it together.

        Returns:
            ``examples``, their number; ``moved``, the id, old and new source of each that moved; ``new`` sources.
        """
        changes: Json = {}
        with self.group.together():
            if self.group.is_first:
                changes = self._changes(step)
        self._seen = []
        return self.group.share_json(changes)

    def state(self) -> dict[str, Tensor]:
        """The first rank's part of a checkpoint."""
        latest = self._latest()
        return {"ids": latest.ids, "sources": latest.sources, "states": latest.states}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from a `state`, on the first rank."""
        self._seen = [_States(saved["ids"], saved["sources"], saved["states"])]

    def _record(self, batch: Batch, hidden: Tensor) -> None:
        if len(batch.positions):
            found = mean_states(batch, hidden)[: len(batch.positions)] @ self._projection
            at = on_device(batch.positions, found.device)
            self._local[at] += torch.cat([found, torch.ones_like(found[:, :1])], dim=1)

    def _changes(self, step: int) -> Json:
        latest = self._latest()
        latest = latest.at(latest.states.isfinite().all(1))
        if not len(latest.ids):
            return {"examples": 0, "moved": [], "new": []}
        seed = int(generator(self._seed, "regroup", step).initial_seed() % 2**32)
        found = regroup(latest.states.numpy(), latest.sources.numpy(), seed)
        now = torch.from_numpy(found.sources)
        moved = torch.stack([latest.ids, latest.sources, now], dim=1)[now != latest.sources]
        return {"examples": len(latest.ids), "moved": moved.tolist(), "new": [*found.new]}

    def _latest(self) -> _States:
        """The last state of each example, in the order in which they were seen."""
        nothing = _States(long_tensor([]), long_tensor([]), torch.zeros(0, DIMENSIONS))
        columns = zip(*[(seen.ids, seen.sources, seen.states) for seen in (nothing, *self._seen)])
        whole = _States(*map(torch.cat, columns))
        return whole.at(last_of_each(whole.ids))


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
        self._moved = torch.zeros(0, 2, dtype=torch.int64)  # ids that ever moved, ascending, and their current sources

    @property
    def shares(self) -> Tensor | None:
        return source_shares(self._selection.shares, self._names, self.sizes)

    def relabelled(self, candidates: Candidates) -> Candidates:
        self._seen.begin(len(candidates))
        if not len(self._moved):
            return candidates
        ids, sources = self._moved.T
        places = torch.searchsorted(ids.contiguous(), candidates.ids).clamp(max=len(ids) - 1)
        moved = ids[places] == candidates.ids
        return replace(candidates, sources=torch.where(moved, sources[places], candidates.sources))

    def watching(self) -> AbstractContextManager[None]:
        return self._seen.watching()

    def gather(self, candidates: Candidates) -> None:
        self._seen.gather(candidates)

    def __call__(self, step: int, state: SourceState) -> Drift | None:
        if step % self._every:
            return None
        started = time.perf_counter()
        changes = self._seen.cluster(step)
        ids, before, now = long_tensor(changes["moved"]).view(-1, 3).T
        self._move(torch.stack([ids, now], dim=1))
        self.sizes += torch.bincount(now, minlength=len(self.sizes)) - torch.bincount(before, minlength=len(self.sizes))
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
        return {"sizes": self.sizes.clone(), "moved": self._moved, **self._seen.state()}

    def load(self, saved: Mapping[str, Tensor] | None, state: SourceState) -> None:
        table: Json | None = None
        if saved is not None:
            table = {name: saved[name].tolist() for name in ("sizes", "moved")}
            self._seen.load(saved)
        shared = self._seen.group.share_json(table)
        self.sizes, self._moved = long_tensor(shared["sizes"]), self._moved[:0]
        self._move(long_tensor(shared["moved"]).view(-1, 2))
        self.kept, state.shares = state.kept, self.shares

    def _move(self, changes: Tensor) -> None:
        """Take in ``[k, 2]`` ids and their new sources."""
        moved = torch.cat([self._moved, changes])
        moved = moved[last_of_each(moved[:, 0])]
        self._moved = moved[moved[:, 0].argsort()]

    def _named(self, which: Tensor) -> list[str]:
        return [self._names[source] for source in which.nonzero().flatten().tolist()]
