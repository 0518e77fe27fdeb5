"""Streamed training data: rank 0 reads, and broadcasts the candidates."""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedTokenizerBase

from colm_scale.config import RunConfig
from colm_scale.data.stream import BlockStream, Position, Survey
from colm_scale.distributed.examples import decoded, encoded
from colm_scale.distributed.group import Group
from colm_scale.errors import UserError
from colm_scale.records import Candidates, Json, long_tensor


def share_survey(surveyed: Survey | None, group: Group) -> Survey:
    """Return rank 0's survey on every rank; the others pass None."""
    names = ("sizes", "protected_sizes")
    plain: Json = {}
    if surveyed is not None:
        plain = dataclasses.asdict(surveyed) | {name: getattr(surveyed, name).tolist() for name in names}
    shared = group.share_json(plain)
    counts = {name: long_tensor(shared[name]) for name in names}
    texts = {name: tuple(shared[name]) for name in ("source_names", "notes")}
    return Survey(**shared | texts | counts)


class StreamedSampler:
    """Gives each step the next examples of a stream that only rank 0 reads.

    Attributes:
        examples: The ``n`` candidates last drawn, in order, with the survey's sources; none before the first step.
        counts: On rank 0, examples per source with each of the `REMARKS` so far; updated as they come.

    Args:
        surveyed: Survey of the training data, equal on every rank. Only rank 0 needs the data itself.
        max_length: Longest example, in tokens.

    Raises:
        UserError: There are fewer rows than candidates, or the first block of rows cannot be tokenised.
        TrainingError: The first block has changed since the survey.
    """

    _stream: BlockStream
    """On rank 0."""

    def __init__(
        self, config: RunConfig, surveyed: Survey, tokenizer: PreTrainedTokenizerBase, max_length: int, group: Group
    ):
        self._count, self._group, self._names = config.selection.candidates, group, surveyed.source_names
        self._protects = bool(surveyed.protected_sizes.any())
        if self._count > surveyed.rows:
            raise UserError(
                f"--selection.candidates is {self._count}, but there are only {surveyed.rows} training examples: use "
                f"at most {surveyed.rows}"
            )
        self.counts: dict[str, dict[str, int]] = {}
        if group.is_first:
            files, seed = config.data.train or [], config.train.seed
            self._stream = BlockStream(files, config.data, surveyed, tokenizer, max_length, seed)
            self.counts = self._stream.counts
        nothing = long_tensor([])
        self.examples = decoded(torch.stack([nothing] * 3), nothing.int(), self._names)

    def __call__(self, step: int) -> Candidates:
        """Draw the candidates of the next step: ``24 n`` bytes, and 4 per token.

        Raises:
            UserError, TrainingError: On rank 0, see `BlockStream.draw`.
            PeerFailed: On the others, if rank 0 failed.
        """
        first, device = self._group.is_first, self._group.device
        rows, tokens = torch.zeros(3, self._count, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
        with self._group.together():
            if first:
                rows, tokens = encoded(self._stream.draw(self._count))
        rows = self._group.broadcast(rows.to(device), "stream").cpu()
        if not first:  # the lengths in the first message fix the size of the second
            tokens = torch.empty(int(rows[2].sum()), dtype=torch.int32)
        tokens = self._group.broadcast(tokens.to(device), "stream").cpu()
        self.examples = decoded(rows, tokens, self._names)
        indices = torch.arange(self._count)
        protected = self.examples.protected if self._protects else None
        return Candidates(step, indices, self.examples.ids, self.examples.sources, self.examples.lengths, protected)

    def state(self) -> Json:
        """Return the position of the next step and the counts so far, on rank 0; elsewhere nothing."""
        if not self._group.is_first:
            return {}
        return dataclasses.asdict(self._stream.position) | {remark: dict(of) for remark, of in self.counts.items()}

    def load(self, state: Json) -> None:
        """Resume from rank 0's `state`. All ranks call it together.

        Raises:
            UserError, TrainingError, PeerFailed: As when the sampler is called.
        """
        with self._group.together():
            if self._group.is_first:
                self._stream.seek(Position(state["epoch"], state["block"], state["offset"]))
                for remark, of in self.counts.items():
                    of.clear()
                    of.update(state.get(remark, {}))
