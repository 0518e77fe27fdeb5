"""Tokenisation: rows to token ids, with a mark on every token that carries loss.

Examples that are too long are dropped or cut, and counted.

    N  examples that survived        Q  sources        total  tokens of all examples
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from colm_scale.config import DataConfig
from colm_scale.data.encoding import Encoded, encode
from colm_scale.data.readers import Row
from colm_scale.errors import UserError
from colm_scale.records import long_tensor

DROPPED, CUT, LEFT_OUT, NO_END = REMARKS = ("dropped", "cut", "left out", "no end")
"""What may be said of an example: too long or without a label token, so not trained on; cut to the longest length; its
chat template leaves out something the row says; a learned part ends in no end token."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokenised examples, concatenated. All tensors are on the CPU, and never written: they may be a file's pages.

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
        left_out: Chats of which the template leaves something out, per source (only sources with any).
        no_end: Examples with a learned part that ends in no end token, per source (only sources with any).
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
    left_out: dict[str, int] = field(default_factory=dict)
    no_end: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Examples per source with each of the `REMARKS`."""
        return dict(zip(REMARKS, (self.dropped, self.cut, self.left_out, self.no_end)))

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
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
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
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    max_length: int,
    source_names: Sequence[str] = (),
) -> Examples:
    """Tokenise rows, and drop or cut those longer than ``max_length`` tokens. Few rows are held at a time.

    A prompt starts with the tokenizer's own leading special tokens, and a completion ends with its end-of-sequence
    token; a chat is rendered by its template.

    Args:
        source_names: For held-out data, the sources of the training data; they keep their numbers, and others follow.

    Raises:
        UserError: No example is left, the tokenizer has no end-of-sequence token, or a chat template is missing or
            renders chats so that the assistant's turns cannot be located.
    """
    collected = _collected(rows, tokenizer, config, max_length)
    if not collected.ids:
        nothing = none_left(len(collected.all_lengths), max_length)
        raise UserError(f"{nothing}, and the shortest example has {min(collected.all_lengths, default=0)}")
    return collected.examples(source_names)


def none_left(rows: int, max_length: int) -> str:
    return (
        f"none of the {rows} examples can be used: the longest allowed length is {max_length} tokens "
        "(--data.max_length, or the model's context), and within it something must be marked to be learned"
    )


def too_few(count: int, usable: int, dropped: Mapping[str, int]) -> str:
    return (
        f"--selection.candidates is {count}, but there are only {usable} training examples "
        f"({sum(dropped.values())} were dropped): use at most {usable}"
    )


def remarks_on(encoded: Encoded, config: DataConfig, max_length: int) -> list[str]:
    """Tell what becomes of a row as an example."""
    overlong = len(encoded.tokens) > max_length
    found = [CUT] if overlong else []
    if (overlong and config.overlong == "drop") or not encoded.labelled[:max_length].any():
        found = [DROPPED]
    return [*found, *([LEFT_OUT] if encoded.left_out else []), *([] if encoded.ends else [NO_END])]


def count_lines(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Describe the `counts` of training examples, a line for each remark that is made of any."""
    said = {
        DROPPED: "training examples too long or without anything to learn, dropped",
        CUT: "training examples too long, cut",
        LEFT_OUT: "training examples of which the chat template leaves something out",
        NO_END: "warning: training examples with a learned part that ends in no end token, so the model is not taught "
        "to stop (--data.chat_template FILE gives another template)",
    }
    lines = []
    for remark, of in counts.items():
        if total := sum(of.values()):
            by_source = ", ".join(f"{name} {count}" for name, count in of.items() if count)
            lines.append(f"{said[remark]}: {total} ({by_source})")
    return lines


def tokenise_block(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    max_length: int,
    source_names: Sequence[str],
) -> Examples:
    """Tokenise a part of the rows as `tokenise` does, except that no example need be left."""
    return _collected(rows, tokenizer, config, max_length).examples(source_names)


class _Collected:
    """Usable examples so far, in buffers that grow: a Python object per example would be larger than its tokens.

    Attributes:
        numbers: Of the sources, in order of appearance.
        all_lengths: Of all rows, before they are cut or dropped.
    """

    def __init__(self) -> None:
        self.tokens, self.labelled, self.protected = bytearray(), bytearray(), bytearray()
        self.lengths, self.ids, self.sources, self.all_lengths = array("q"), array("q"), array("q"), array("q")
        self.numbers: dict[str, int] = {}
        self.counts: dict[str, Counter[str]] = {remark: Counter() for remark in REMARKS}

    def add(self, row: Row, tokens: np.ndarray, labelled: np.ndarray) -> None:
        self.tokens += tokens.tobytes()
        self.labelled += labelled.tobytes()
        self.protected.append(row.protected)
        self.lengths.append(len(tokens))
        self.ids.append(row.id)
        self.sources.append(self.numbers.setdefault(row.source, len(self.numbers)))

    def examples(self, source_names: Sequence[str]) -> Examples:
        """Return the examples, with ``source_names`` first and other sources sorted after them."""
        names = (*source_names, *sorted(self.numbers.keys() - set(source_names)))
        number = {name: source for source, name in enumerate(names)}
        sorted_numbers = np.array([number[name] for name in self.numbers], np.int64)
        return Examples(
            tokens=torch.from_numpy(np.frombuffer(self.tokens, np.int32)),
            labelled=torch.from_numpy(np.frombuffer(self.labelled, bool)),
            offsets=offsets_of(torch.from_numpy(np.frombuffer(self.lengths, np.int64))),
            ids=torch.from_numpy(np.frombuffer(self.ids, np.int64)),
            sources=torch.from_numpy(sorted_numbers[np.frombuffer(self.sources, np.int64)]),
            protected=torch.from_numpy(np.frombuffer(self.protected, bool)),
            source_names=names,
            dropped=dict(self.counts[DROPPED]),
            cut=dict(self.counts[CUT]),
            left_out=dict(self.counts[LEFT_OUT]),
            no_end=dict(self.counts[NO_END]),
        )


def _collected(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, max_length: int
) -> _Collected:
    collected = _Collected()
    for encoded in encode(rows, tokenizer, config):
        row, remarks = encoded.row, remarks_on(encoded, config, max_length)
        collected.all_lengths.append(len(encoded.tokens))
        if DROPPED not in remarks:
            collected.add(row, encoded.tokens[:max_length], encoded.labelled[:max_length])
        for remark in remarks:
            collected.counts[remark][row.source] += 1
    return collected
