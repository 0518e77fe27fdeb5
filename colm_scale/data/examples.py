"""Tokenisation: rows to token ids, with a mark on every token that carries loss (DESIGN 2.4).

A row is split into segments of text, with or without loss. Each segment is tokenised separately, so that no token
straddles the border between prompt and completion. Examples that are too long are dropped or cut, and counted.

    N  examples that survived        Q  sources        total  tokens of all examples
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from colm_scale.config import DataConfig, RowConfig
from colm_scale.data.formats import said
from colm_scale.data.readers import Message, Row
from colm_scale.errors import UserError
from colm_scale.records import long_tensor

_ROWS_AT_ONCE = 4096
"""Rows tokenised in one call: enough to keep its threads busy, few enough to bound its lists of Python ints."""


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


_Segment = tuple[str, bool]
"""A text, and whether it carries loss."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row's tokens ``[T]`` int32, and labelled ``[T]`` bool."""

    row: Row
    tokens: np.ndarray
    labelled: np.ndarray


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
        "(--data.max_length, or the model's context)"
    )


def too_few(count: int, usable: int, dropped: Mapping[str, int]) -> str:
    return (
        f"--selection.candidates is {count}, but there are only {usable} training examples "
        f"({sum(dropped.values())} were dropped): use at most {usable}"
    )


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
        self.dropped: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()

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
            dropped=dict(self.dropped),
            cut=dict(self.cut),
        )


def _collected(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, max_length: int
) -> _Collected:
    collected = _Collected()
    for encoded in encode(rows, tokenizer, config):
        row, tokens, labelled = encoded.row, encoded.tokens, encoded.labelled
        collected.all_lengths.append(len(tokens))
        overlong = len(tokens) > max_length
        if overlong and config.overlong == "cut":
            tokens, labelled = tokens[:max_length], labelled[:max_length]
        if len(tokens) > max_length or not labelled.any():
            collected.dropped[row.source] += 1
            continue
        if overlong:
            collected.cut[row.source] += 1
        collected.add(row, tokens, labelled)
    return collected


def encode(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, config: RowConfig) -> Iterator[Encoded]:
    """Tokenise every row, in order and whatever its length.

    Raises:
        UserError: As `tokenise`.
    """
    check_tokenizer(tokenizer, config, first_chat="")
    leading, eos = leading_special_tokens(tokenizer), [tokenizer.eos_token_id]
    left = iter(rows)
    while batch := list(islice(left, _ROWS_AT_ONCE)):
        first_chat = next((row.where for row in batch if row.messages), "")
        chats = _Chats(tokenizer, check_tokenizer(tokenizer, config, first_chat))
        written = [
            chats.segments(row) if row.messages else [(row.prompt, False), (row.completion, True)] for row in batch
        ]
        pieces = iter(_plain_ids(tokenizer, [text for segments in written for text, _ in segments]))
        for row, segments in zip(batch, written):
            parts = [(next(pieces), labelled) for _, labelled in segments]
            if not row.messages:
                parts = [(leading, False), *parts, (eos, True)]
            tokens = np.fromiter(chain.from_iterable(ids for ids, _ in parts), dtype=np.int32)
            marks = np.repeat([labelled for _, labelled in parts], [len(ids) for ids, _ in parts])
            marks[:1] = False
            yield Encoded(row, tokens, marks)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Not verbose: texts above the model's context are counted here, and need no warning.
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens put before a text, often a begin-of-sequence token; those put after it are left out."""
    text = "a"
    whole: list[int] = tokenizer(text)["input_ids"]
    (plain,) = _plain_ids(tokenizer, [text])
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: RowConfig, first_chat: str) -> str:
    """Check that a tokenizer can encode all rows, and return the Jinja template for chats; empty without chats.

    Args:
        first_chat: File and line of the first chat; empty without chats.

    Raises:
        UserError: There is no end-of-sequence token, or no chat template though there are chats.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end-of-sequence token (eos_token), so no answer could ever end")
    given = read_chat_template(config)
    if not first_chat:
        return ""
    try:
        template: str = tokenizer.get_chat_template(given)
        return template
    except ValueError as error:
        raise UserError(
            f"{first_chat} is a chat, but the model's tokenizer has no chat template: "
            "give one with --data.chat_template FILE"
        ) from error


def read_chat_template(config: RowConfig) -> str | None:
    """Read the file ``--data.chat_template``; None if the option is not given."""
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data.chat_template {config.chat_template} cannot be read: {error}") from error


class _Chats:
    """Renders chats as segments; the assistant's turns, with the end of each turn, carry loss."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str):
        self._tokenizer, self._template = tokenizer, template

    def segments(self, row: Row) -> list[_Segment]:
        """Cut the rendered chat into segments.

        Raises:
            UserError: The template fails on this chat, or renders its first messages to something other than a prefix
                of the whole chat, so that the borders of turns cannot be located.
        """
        messages = row.messages
        whole, done = self._render(row, messages), ""
        segments: list[_Segment] = []
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(row, messages[:turn], add_generation_prompt=True)
            after = self._render(row, messages[: turn + 1])
            if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    f"{row.where}: the chat template renders message {turn + 1} of {len(messages)} differently when "
                    "it is the last one, so the assistant's turn cannot be told from the rest: use a template that "
                    "only appends, with --data.chat_template FILE"
                )
            segments += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return [*segments, (whole[len(done) :], False)]

    def _render(self, row: Row, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        chat = [asdict(message) for message in messages]
        render: Callable[..., object] = self._tokenizer.apply_chat_template
        try:
            # A batch of one: alone, an empty chat (before an assistant that speaks first) is taken for a batch.
            rendered = render(
                [chat], chat_template=self._template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program, and may raise anything, jinja2's errors among others
            raise UserError(
                f"{row.where}: the chat template refuses these messages: {said(error)}. Correct the row, or give "
                "another template with --data.chat_template FILE"
            ) from error
        assert isinstance(rendered, list)
        text: str = rendered[0]
        return text
