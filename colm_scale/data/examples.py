"""Rows into token ids, with a mark on every token that is learned (DESIGN 2.4).

A row is written as segments of text, each learned or not; every segment is tokenised by itself, so that no token
straddles the border between prompt and completion; the segments are joined; what is too long is dropped or cut, and
counted.

    N  examples that survived        Q  sources        total  tokens of all examples
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
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
"""Rows tokenised in one call: many enough to keep its threads busy, few enough to bound its lists of Python ints."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokenised examples, one after the other. All tensors are on the CPU.

    Attributes:
        tokens: ``[total]`` int32.
        labelled: ``[total]`` bool, True on tokens that carry loss; never on an example's first, which nothing predicts.
        offsets: ``[N + 1]`` int64, example i is ``tokens[offsets[i]:offsets[i + 1]]``.
        ids: ``[N]`` int64 rows of the user's data.
        sources: ``[N]`` int64, 0..Q-1.
        protected: ``[N]`` bool, trained on whenever they are candidates.
        source_names: ``[Q]``, sorted by name, after those of the training data where they are given.
        dropped: Examples left out per source (only sources with any): too long, or without a token to learn.
        cut: Examples cut to the longest length per source (only sources with any).
    """

    tokens: Tensor
    labelled: Tensor
    offsets: Tensor
    ids: Tensor
    sources: Tensor
    protected: Tensor
    source_names: tuple[str, ...]
    dropped: dict[str, int]
    cut: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """``[N]`` int64 tokens of each example."""
        return self.offsets.diff()

    def label_counts(self, indices: Tensor) -> Tensor:
        """``[n]`` int64 tokens of each of the examples ``indices`` that carry loss, at least 1."""
        starts, ends = self.offsets[indices].tolist(), self.offsets[indices + 1].tolist()
        return long_tensor([int(self.labelled[start:end].sum()) for start, end in zip(starts, ends)])

    @property
    def sizes(self) -> Tensor:
        """``[Q]`` int64 examples of each source."""
        return torch.bincount(self.sources, minlength=len(self.source_names))

    @property
    def protected_sizes(self) -> Tensor:
        """``[Q]`` int64 protected examples of each source."""
        return torch.bincount(self.sources[self.protected], minlength=len(self.source_names))

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens ``[T]`` int32 and marks ``[T]`` bool of one example."""
        start, end = self.offsets[index : index + 2].tolist()
        return self.tokens[start:end], self.labelled[start:end]

    def prompt_and_reference(self, index: int) -> tuple[list[int], list[int]]:
        """The tokens of the last learned run (a completion, or a chat's last answer), and all those before it."""
        tokens, labelled = self.example(index)
        end = int(labelled.nonzero()[-1]) + 1
        start = int((~labelled[:end]).nonzero()[-1]) + 1
        return tokens[:start].tolist(), tokens[start:end].tolist()

    def take(self, indices: Tensor) -> Examples:
        """A copy of the examples at ``[k]`` indices, at least one, in that order; it counts nothing as left out."""
        tokens, labelled = zip(*map(self.example, indices.tolist()))
        return Examples(
            tokens=torch.cat(tokens),
            labelled=torch.cat(labelled),
            offsets=offsets_of(self.lengths[indices]),
            ids=self.ids[indices],
            sources=self.sources[indices],
            protected=self.protected[indices],
            source_names=self.source_names,
            dropped={},
            cut={},
        )

    def digest(self) -> str:
        """SHA-256 of everything in it, in hexadecimal: equal on ranks that read the same data in the same way."""
        counts = sorted(self.dropped.items()), sorted(self.cut.items())
        digest = hashlib.sha256(repr((self.source_names, counts, len(self), len(self.tokens))).encode())
        for tensor in (self.tokens, self.labelled, self.offsets, self.ids, self.sources, self.protected):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def offsets_of(lengths: Tensor) -> Tensor:
    """``[N + 1]`` where examples of ``[N]`` lengths begin, one after the other, and the last one ends."""
    return torch.cat([long_tensor([0]), lengths.cumsum(0)])


def joined(parts: Sequence[Examples]) -> Examples:
    """At least one part, all of the same sources, one after the other; what they count as left out is not added up."""
    return Examples(
        tokens=torch.cat([part.tokens for part in parts]),
        labelled=torch.cat([part.labelled for part in parts]),
        offsets=offsets_of(torch.cat([part.lengths for part in parts])),
        ids=torch.cat([part.ids for part in parts]),
        sources=torch.cat([part.sources for part in parts]),
        protected=torch.cat([part.protected for part in parts]),
        source_names=parts[0].source_names,
        dropped={},
        cut={},
    )


@dataclass(frozen=True, slots=True)
class _Segment:
    text: str
    labelled: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row's tokens ``[T]`` int32, and ``[T]`` bool marks of those that are learned."""

    row: Row
    tokens: np.ndarray
    labelled: np.ndarray


def tokenise(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    max_length: int,
    source_names: Sequence[str] | None = None,
) -> Examples:
    """Tokenise rows, and drop or cut what is longer than ``max_length`` tokens.

    A prompt starts with the tokenizer's own leading special tokens, a completion ends with its end-of-sequence token;
    a chat is what its template writes.

    Args:
        source_names: For held-out data, the sources of the training data; they keep their numbers, and others follow.

    Raises:
        UserError: No example is left, the tokenizer has no end-of-sequence token, or a chat template is missing or does
            not let the assistant's turns be found.
    """
    examples = tokenise_block(rows, tokenizer, config, max_length, source_names or ())
    if not len(examples):
        shortest = min((len(encoded.tokens) for encoded in encode(rows, tokenizer, config)), default=0)
        raise UserError(f"{none_left(len(rows), max_length)}, and the shortest example has {shortest}")
    return examples


def none_left(rows: int, max_length: int) -> str:
    return (
        f"none of the {rows} examples can be used: the longest allowed length is {max_length} tokens "
        "(--data.max_length, or the model's context)"
    )


def tokenise_block(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    max_length: int,
    source_names: Sequence[str],
) -> Examples:
    """As `tokenise`, for some of all rows: it may be that none of them can be used."""
    kept: list[Encoded] = []
    dropped: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    for encoded in encode(rows, tokenizer, config):
        length = len(encoded.tokens)
        if length > max_length and config.overlong == "cut":
            encoded = Encoded(encoded.row, encoded.tokens[:max_length], encoded.labelled[:max_length])
        if len(encoded.tokens) > max_length or not encoded.labelled.any():
            dropped[encoded.row.source] += 1
            continue
        if length > max_length:
            cut[encoded.row.source] += 1
        kept.append(encoded)
    return _packed(kept, source_names, dict(dropped), dict(cut))


def _packed(kept: Sequence[Encoded], known: Sequence[str], dropped: dict[str, int], cut: dict[str, int]) -> Examples:
    names = (*known, *sorted({encoded.row.source for encoded in kept}.difference(known)))
    number = {name: source for source, name in enumerate(names)}
    return Examples(
        tokens=torch.from_numpy(np.concatenate([np.empty(0, np.int32), *(encoded.tokens for encoded in kept)])),
        labelled=torch.from_numpy(np.concatenate([np.empty(0, bool), *(encoded.labelled for encoded in kept)])),
        offsets=offsets_of(long_tensor([len(encoded.tokens) for encoded in kept])),
        ids=long_tensor([encoded.row.id for encoded in kept]),
        sources=long_tensor([number[encoded.row.source] for encoded in kept]),
        protected=torch.tensor([encoded.row.protected for encoded in kept], dtype=torch.bool),
        source_names=names,
        dropped=dropped,
        cut=cut,
    )


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: RowConfig) -> Iterator[Encoded]:
    """Every row as tokens, however long, in order.

    Raises:
        UserError: As `tokenise`.
    """
    first_chat = next((row.where for row in rows if row.messages), None)
    chats = _Chats(tokenizer, check_tokenizer(tokenizer, config, first_chat))
    leading, eos = _leading_special_tokens(tokenizer), [tokenizer.eos_token_id]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows[start : start + _ROWS_AT_ONCE]
        written = [chats.segments(row) if row.messages else _pair(row) for row in batch]
        pieces = iter(_plain_ids(tokenizer, [segment.text for segments in written for segment in segments]))
        for row, segments in zip(batch, written):
            parts = [(next(pieces), segment.labelled) for segment in segments]
            if not row.messages:
                parts = [(leading, False), *parts, (eos, True)]
            yield _encoded(row, parts)


def _pair(row: Row) -> list[_Segment]:
    return [_Segment(row.prompt, False), _Segment(row.completion, True)]


def _encoded(row: Row, parts: Sequence[tuple[list[int], bool]]) -> Encoded:
    tokens = np.fromiter(chain.from_iterable(ids for ids, _ in parts), dtype=np.int32)
    labelled = np.repeat([labelled for _, labelled in parts], [len(ids) for ids, _ in parts])
    labelled[:1] = False
    return Encoded(row, tokens, labelled)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose: no warning about texts above the model's context, which are counted here.
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text (often a begin-of-sequence token); what it puts after is left out."""
    text = "a"
    whole: list[int] = tokenizer(text)["input_ids"]
    (plain,) = _plain_ids(tokenizer, [text])
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: RowConfig, first_chat: str | None) -> str | None:
    """Check that a tokenizer can write all rows; the Jinja text that writes the chats among them.

    Args:
        first_chat: Where the first chat stands; None without any, and then no template is needed.

    Raises:
        UserError: There is no end-of-sequence token, or no chat template though there are chats.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end-of-sequence token (eos_token), so no answer could ever end")
    given = read_chat_template(config)
    if first_chat is None:
        return None
    try:
        return tokenizer.get_chat_template(given)
    except ValueError as error:
        raise UserError(
            f"{first_chat} is a chat, but the model's tokenizer has no chat template: "
            "give one with --data.chat_template FILE"
        ) from error


def read_chat_template(config: RowConfig) -> str | None:
    """What ``--data.chat_template`` holds, where it is given."""
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data.chat_template {config.chat_template} cannot be read: {error}") from error


class _Chats:
    """Writes chats as segments, the assistant's turns (with the end of the turn) labelled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None):
        self._tokenizer, self._template = tokenizer, template

    def segments(self, row: Row) -> list[_Segment]:
        """Segments whose texts together are the rendered chat.

        Raises:
            UserError: The template fails on this chat, or what it writes for its first messages is not how it begins to
                write all of them, so that nobody can tell where a turn starts and ends.
        """
        messages = row.messages or ()
        whole, done = self._render(row, messages), ""
        segments: list[_Segment] = []
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(row, messages[:turn], add_generation_prompt=True)
            after = self._render(row, messages[: turn + 1])
            if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    f"{row.where}: the chat template writes message {turn + 1} of {len(messages)} otherwise when "
                    "it is the last one than within the chat, so the assistant's turn cannot be told from the rest: "
                    "give a template that only ever appends, with --data.chat_template FILE"
                )
            segments += [_Segment(before[len(done) :], False), _Segment(after[len(before) :], True)]
            done = after
        return [*segments, _Segment(whole[len(done) :], False)]

    def _render(self, row: Row, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        chat = [asdict(message) for message in messages]
        render: Callable[..., object] = self._tokenizer.apply_chat_template
        try:
            # As a batch of one: by itself, an empty chat (before an assistant that speaks first) is no chat.
            rendered = render(
                [chat], chat_template=self._template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program, and fails in as many ways; its own errors are jinja2's
            raise UserError(
                f"{row.where}: the chat template refuses these messages: {said(error)}. Correct the row, or give "
                "another template with --data.chat_template FILE"
            ) from error
        assert isinstance(rendered, list)
        text: str = rendered[0]
        return text
