"""Streamed training data on several ranks: the first one reads, and tells the others what the candidates are."""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedTokenizerBase

from colm_scale.config import RunConfig
from colm_scale.data.examples import Examples
from colm_scale.data.stream import BlockStream, Position, Survey
from colm_scale.distributed.examples import decoded, encoded
from colm_scale.distributed.group import Group
from colm_scale.errors import UserError
from colm_scale.records import Candidates, Json, long_tensor


def share_survey(surveyed: Survey | None, group: Group) -> Survey:
    """The first rank's survey on every rank; the others pass None."""
    plain: Json | None = None
    if surveyed is not None:
        counts = {name: getattr(surveyed, name).tolist() for name in ("sizes", "protected_sizes")}
        plain = dataclasses.asdict(surveyed) | counts
    shared = group.share_json(plain)
    counts = {name: long_tensor(shared[name]) for name in ("sizes", "protected_sizes")}
    return Survey(**shared | {"source_names": tuple(shared["source_names"])} | counts)


class StreamedSampler:
    """Gives each step the next examples of a stream that only the first rank reads.

    Attributes:
        examples: The ``n`` candidates last drawn, in their order, with the survey's sources; none before any step.
        dropped, cut: On the first rank, examples per source that were left out or cut so far; filled as they come.

    Args:
        surveyed: Of the training data, equal on every rank. The data itself need be on the first rank only.
        max_length: Longest example, in tokens.

    Raises:
        UserError: There are fewer rows than candidates, or the first block of rows cannot be tokenised.
        TrainingError: The first block has changed since it was surveyed.
    """

    def __init__(
        self, config: RunConfig, surveyed: Survey, tokenizer: PreTrainedTokenizerBase, max_length: int, group: Group
    ):
        self._count, self._group, self._names = config.selection.candidates, group, surveyed.source_names
        self._protects = bool(surveyed.protected_sizes.any())
        if self._count > surveyed.rows:
            raise UserError(
                f"--selection.candidates is {self._count}, but there are only {surveyed.rows} training "
                f"examples: use at most {surveyed.rows}"
            )
        self._stream: BlockStream | None = None
        self.dropped: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        if group.is_first:
            assert config.data.train is not None  # the built-in mixture is no stream
            self._stream = BlockStream(
                config.data.train, config.data, surveyed, tokenizer, max_length, config.train.seed
            )
            self.dropped, self.cut = self._stream.dropped, self._stream.cut
        nothing = long_tensor([])
        self.examples = decoded(torch.stack([nothing] * 3), nothing.int(), self._names)

    def __call__(self, step: int) -> Candidates:
        """The candidates of a step; steps are asked for in turn.

        Raises:
            UserError, TrainingError: On the first rank, see `BlockStream.draw`.
            PeerFailed: On the others, if the first one failed.
        """
        drawn = None
        with self._group.together():
            if self._stream is not None:
                drawn = self._stream.draw(self._count)
        self.examples = self._shared(drawn)
        indices = torch.arange(self._count)
        protected = self.examples.protected if self._protects else None
        return Candidates(step, indices, self.examples.ids, self.examples.sources, self.examples.lengths, protected)

    def state(self) -> Json:
        """Where the next step begins and what was left out so far, on the first rank; elsewhere nothing."""
        if self._stream is None:
            return {}
        return dataclasses.asdict(self._stream.position) | {"dropped": dict(self.dropped), "cut": dict(self.cut)}

    def load(self, state: Json) -> None:
        """Go on where the first rank's `state` was taken. All ranks call it together.

        Raises:
            UserError, TrainingError, PeerFailed: As when the sampler is called.
        """
        with self._group.together():
            if self._stream is not None:
                self._stream.seek(Position(state["epoch"], state["block"], state["offset"]))
                for counts, saved in ((self.dropped, state["dropped"]), (self.cut, state["cut"])):
                    counts.clear()
                    counts.update(saved)

    def _shared(self, drawn: Examples | None) -> Examples:
        """The first rank's examples on every rank: ``24 n`` bytes, and 4 per token; the others pass None.

        A message of known size says how long the examples are, and so how long the other one is.
        """
        device = self._group.device
        rows, tokens = torch.zeros(3, self._count, dtype=torch.int64), None
        if drawn is not None:
            rows, tokens = encoded(drawn)
        rows = self._group.broadcast(rows.to(device), "stream").cpu()
        if tokens is None:
            tokens = torch.empty(int(rows[2].sum()), dtype=torch.int32)
        return decoded(rows, self._group.broadcast(tokens.to(device), "stream").cpu(), self._names)
