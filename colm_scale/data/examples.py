"""Tokenisation: rows to token ids, with a mark on every token that carries loss (DESIGN 2.4).

Examples that are too long are dropped or cut, and counted.

    N  examples that survived        Q  sources        total  tokens of all examples
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from colm_scale.config import DataConfig
from colm_scale.data.encoding import Encoded, encode
from colm_scale.data.readers import Row
from colm_scale.errors import UserError
from colm_scale.records import long_tensor


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokenised examples, concatenated. All tensors are on the CPU.

    Attributes:
        tokens: ``[total]`` int32.
        labelled: ``[total]`` bool, True on tokens that carry loss; never on an example's first, which is not predicted.
        offsets: ``[N + 1]`` int64, example i is ``tokens[offsets[i]:offsets[i + 1]]``.
        ids: ``[N]`` int64 rows of the user's data.
        sources: ``[N]`` int64, 0..Q-1.
        protected: ``[N]`` bool, trained on whenever they are candidates.
        source_names: ``[Q]``, sorted by name; in held-out data, those of the training data first.
        dropped: Examples left out per source (only sources with any): too long, or without a label token.
        cut: Examples cut to the longest length per source (only sources with any).
    """

    tokens: Tensor
    labelled: Tensor
    offsets: Tensor
    ids: Tensor
    sources: Tensor
    protected: Tensor
    source_names: tuple[str, ...]
    dropped: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """``[N]`` int64 tokens of each example."""
        return self.offsets.diff()

    def label_counts(self, indices: Tensor) -> Tensor:
        """Count the label tokens, ``[n]`` int64 and at least 1, of the examples at ``[n]`` ``indices``."""
        places, offsets = self._places(indices)
        return torch.from_numpy(np.add.reduceat(self.labelled[places].numpy(), offsets[:-1].numpy(), dtype=np.int64))

    @property
    def sizes(self) -> Tensor:
        """``[Q]`` int64 examples of each source."""
        return torch.bincount(self.sources, minlength=len(self.source_names))

    @property
    def protected_sizes(self) -> Tensor:
        """``[Q]`` int64 protected examples of each source."""
        return torch.bincount(self.sources[self.protected], minlength=len(self.source_names))

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Return tokens ``[T]`` int32 and labelled ``[T]`` bool of one example."""
        start, end = self.offsets[index : index + 2].tolist()
        return self.tokens[start:end], self.labelled[start:end]

    def prompt_and_reference(self, index: int) -> tuple[list[int], list[int]]:
        """Split off the last labelled run (a completion, or a chat's last answer) from the tokens before it."""
        tokens, labelled = self.example(index)
        end = int(labelled.nonzero()[-1]) + 1
        start = int((~labelled[:end]).nonzero()[-1]) + 1
        return tokens[:start].tolist(), tokens[start:end].tolist()

    def take(self, indices: Tensor) -> Examples:
        """Copy the examples at ``[k]`` indices, at least one, in that order; `dropped` and `cut` are empty."""
        places, offsets = self._places(indices)
        return Examples(
            tokens=self.tokens[places],
            labelled=self.labelled[places],
            offsets=offsets,
            ids=self.ids[indices],
            sources=self.sources[indices],
            protected=self.protected[indices],
            source_names=self.source_names,
        )

    def _places(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Places of all tokens of the examples at ``indices``, and the ``[k + 1]`` offsets of these examples."""
        lengths = self.lengths[indices]
        offsets = offsets_of(lengths)
        shifts = (self.offsets[indices] - offsets[:-1]).repeat_interleave(lengths)
        return torch.arange(len(shifts)) + shifts, offsets

    def digest(self) -> str:
        """Return the SHA-256 of all contents, in hexadecimal: equal on ranks that read the same data the same way."""
        counts = sorted(self.dropped.items()), sorted(self.cut.items())
        digest = hashlib.sha256(repr((self.source_names, counts, len(self), len(self.tokens))).encode())
        for tensor in (self.tokens, self.labelled, self.offsets, self.ids, self.sources, self.protected):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def offsets_of(lengths: Tensor) -> Tensor:
    """Return ``[N + 1]`` int64 offsets of concatenated examples of ``[N]`` lengths."""
    return torch.cat([long_tensor([0]), lengths.cumsum(0)])


def joined(parts: Sequence[Examples]) -> Examples:
    """Concatenate one or more parts with the same sources; `dropped` and `cut` are empty."""
    return Examples(
        tokens=torch.cat([part.tokens for part in parts]),
        labelled=torch.cat([part.labelled for part in parts]),
        offsets=offsets_of(torch.cat([part.lengths for part in parts])),
        ids=torch.cat([part.ids for part in parts]),
        sources=torch.cat([part.sources for part in parts]),
        protected=torch.cat([part.protected for part in parts]),
        source_names=parts[0].source_names,
    )


def tokenise(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    max_length: int,
    source_names: Sequence[str] = (),
) -> Examples:
    """Tokenise rows, and drop or cut those longer than ``max_length`` tokens.

    A prompt starts with the tokenizer's own leading special tokens, and a completion ends with its end-of-sequence
    token; a chat is rendered by its template.

    Args:
        source_names: For held-out data, the sources of the training data; they keep their numbers, and others follow.

    Raises:
        UserError: No example is left, the tokenizer has no end-of-sequence token, or a chat template is missing or
            renders chats so that the assistant's turns cannot be located.
    """
    examples = tokenise_block(rows, tokenizer, config, max_length, source_names)
    if not len(examples):
        shortest = min((len(encoded.tokens) for encoded in encode(rows, tokenizer, config)), default=0)
        raise UserError(f"{none_left(len(rows), max_length)}, and the shortest example has {shortest}")
    return examples


def none_left(rows: int, max_length: int) -> str:
    return (
        f"none of the {rows} examples can be used: the longest allowed length is {max_length} tokens "
        "(--data.max_length, or the model's context)"
    )


def too_few(count: int, usable: int, dropped: Mapping[str, int]) -> str:
    return (
        f"--selection.candidates is {count}, but there are only {usable} training examples "
        f"({sum(dropped.values())} were dropped): use at most {usable}"
    )


DROPPED, CUT, LEFT_OUT, NO_END = REMARKS = ("dropped", "cut", "left out", "no end")
"""What may be said of an example: too long or without a label token, so not trained on; cut to the longest length; the
chat template leaves out something the row says; a learned part ends in no end token."""


def remarks_on(encoded: Encoded, config: DataConfig, max_length: int) -> list[str]:
    """Tell what becomes of a row as an example."""
    overlong = len(encoded.tokens) > max_length
    found = [CUT] if overlong else []
    if (overlong and config.overlong == "drop") or not encoded.labelled[:max_length].any():
        found = [DROPPED]
    return [*found, *([LEFT_OUT] if encoded.left_out else []), *([] if encoded.ends else [NO_END])]


def no_end_line(counts: Mapping[str, int]) -> list[str]:
    """Say of how many examples a learned part ends in no end token, if any does."""
    if not sum(counts.values()):
        return []
    return [
        f"{sum(counts.values()):,} examples have a learned part without an end token of the tokenizer at its end, so "
        "the model is not taught to stop: use a chat template that ends each turn with one (--data.chat_template FILE)"
    ]


def tokenise_block(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    max_length: int,
    source_names: Sequence[str],
) -> Examples:
    """Tokenise a part of the rows as `tokenise` does, except that no example need be left."""
    usable: list[Encoded] = []
    dropped: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    for encoded in encode(rows, tokenizer, config):
        length = len(encoded.tokens)
        if length > max_length and config.overlong == "cut":
            encoded = replace(encoded, tokens=encoded.tokens[:max_length], labelled=encoded.labelled[:max_length])
        if len(encoded.tokens) > max_length or not encoded.labelled.any():
            dropped[encoded.row.source] += 1
            continue
        if length > max_length:
            cut[encoded.row.source] += 1
        usable.append(encoded)
    names = (*source_names, *sorted({encoded.row.source for encoded in usable}.difference(source_names)))
    number = {name: source for source, name in enumerate(names)}
    return Examples(
        tokens=torch.from_numpy(np.concatenate([np.empty(0, np.int32), *(encoded.tokens for encoded in usable)])),
        labelled=torch.from_numpy(np.concatenate([np.empty(0, bool), *(encoded.labelled for encoded in usable)])),
        offsets=offsets_of(long_tensor([len(encoded.tokens) for encoded in usable])),
        ids=long_tensor([encoded.row.id for encoded in usable]),
        sources=long_tensor([number[encoded.row.source] for encoded in usable]),
        protected=torch.tensor([encoded.row.protected for encoded in usable], dtype=torch.bool),
        source_names=names,
        dropped=dict(dropped),
        cut=dict(cut),
    )
