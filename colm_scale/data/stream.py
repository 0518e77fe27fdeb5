"""Training data that is read as it is needed, in blocks of rows, one ahead, and never held as a whole.

One pass before the run checks every row, counts the sources and takes a digest; it tokenises nothing. After it, an
epoch reads the rows again from the first one, a block at a time: the block is tokenised, what is too long is dropped or
cut, and the rest is shuffled. What a step takes is a function of the data, the seed and a position, so a run goes on
from a position as if it had never stopped. Nothing here knows of ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from colm_scale.config import DataConfig
from colm_scale.data.examples import Examples, check_tokenizer, joined, none_left, read_chat_template, tokenise_block
from colm_scale.data.readers import Row, stream_rows
from colm_scale.data.source_labels import labelled
from colm_scale.errors import TrainingError, UserError
from colm_scale.randomness import generator
from colm_scale.records import long_tensor


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over the rows has found.

    Attributes:
        source_names: ``[Q]``, sorted by name.
        sizes: ``[Q]`` int64 rows of each source, those included that will be too long.
        protected_sizes: ``[Q]`` int64, how many of them are protected.
        rows: Rows of all sources.
        digest: SHA-256, in hexadecimal, of the rows and of the chat template's file; not of where the rows lie.
        first_chat: Where the first chat stands; None without any.
    """

    source_names: tuple[str, ...]
    sizes: Tensor
    protected_sizes: Tensor
    rows: int
    digest: str
    first_chat: str | None


@dataclass(frozen=True, slots=True)
class Position:
    """Where the next example stands: in which epoch and block of rows, both from 0, after how many of its examples."""

    epoch: int = 0
    block: int = 0
    offset: int = 0


def survey(specs: Sequence[str], config: DataConfig) -> Survey:
    """Read all rows once, and check each.

    Raises:
        UserError: As `stream_rows` and `labelled`, or the chat template cannot be read.
    """
    sizes: Counter[str] = Counter()
    protected: Counter[str] = Counter()
    digest, first_chat = _RowDigest(config), None
    for row in labelled(stream_rows(specs, config), config.sources):
        digest.add(row)
        sizes[row.source] += 1
        protected[row.source] += row.protected
        if first_chat is None and row.messages:
            first_chat = row.where
    names = tuple(sorted(sizes))
    by_source, protected_sizes = (long_tensor([counted[name] for name in names]) for counted in (sizes, protected))
    return Survey(names, by_source, protected_sizes, sizes.total(), digest.hexadecimal(), first_chat)


class BlockStream:
    """An endless stream of examples; every usable one comes once per epoch.

    Of the data, one block is held at a time, and the next is read and tokenised meanwhile, in a thread of its own. The
    first is read at once, so that much of what can be wrong with the rows or the tokenizer is known before a model is
    loaded.

    Attributes:
        position: Of the next example.
        dropped, cut: Examples per source that were left out or cut, of the blocks that the first epoch has begun.

    Args:
        specs: What was surveyed: .jsonl files and hub data sets.
        max_length: Longest example, in tokens.

    Raises:
        UserError: The tokenizer cannot write the rows, see `tokenise`.
        TrainingError: The rows are no longer those that were surveyed.
    """

    def __init__(
        self,
        specs: Sequence[str],
        config: DataConfig,
        surveyed: Survey,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int,
    ):
        self.position = Position()
        self.dropped: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self._specs, self._config, self._surveyed = specs, config, surveyed
        self._tokenizer, self._max_length, self._seed = tokenizer, max_length, seed
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="colm_scale-reader")
        self._ahead: Future[Examples | None] | None = None
        check_tokenizer(tokenizer, config, surveyed.first_chat)
        self.seek(self.position)

    def draw(self, count: int) -> Examples:
        """The next ``count`` examples. They may come from several blocks, and from the next epoch.

        Raises:
            UserError: A whole epoch has fewer, or a chat template refuses a row.
            TrainingError: The rows are no longer those that were surveyed.
        """
        begun, parts, missing = self.position, [], count
        while missing:
            if self.position.offset == 0:
                self._count_left_out()
            taken = self._order[self.position.offset :][:missing]
            if len(taken):
                parts.append(self._block.take(taken))
                missing -= len(taken)
                self.position = replace(self.position, offset=self.position.offset + len(taken))
            else:
                self._next_block()
                if self.position == Position(begun.epoch + 1) and begun == Position(begun.epoch):
                    raise UserError(self._too_few(count - missing, count))
        return joined(parts)

    def seek(self, position: Position) -> None:
        """Go to a position that was one of this stream's; the blocks before it are read, but not tokenised.

        Raises:
            UserError, TrainingError: As `draw`.
        """
        if self._ahead is not None:
            wait([self._ahead])  # it reads from where this stream has been
        self.position, self._blocks = position, self._epoch()
        self._hold(self._tokenised(next(islice(self._blocks, position.block, None))))

    def _next_block(self) -> None:
        del self._block, self._order  # or three blocks would be in memory
        assert self._ahead is not None
        block = self._ahead.result()  # raises what reading has raised
        if block is not None:
            self.position = Position(self.position.epoch, self.position.block + 1)
            self._hold(block)
        else:
            self.seek(Position(self.position.epoch + 1))

    def _hold(self, block: Examples) -> None:
        draws = generator(self._seed, "shuffle", self.position.epoch, self.position.block)
        self._block, self._order = block, torch.randperm(len(block), generator=draws)
        self._ahead = self._reader.submit(self._read_ahead)

    def _read_ahead(self) -> Examples | None:
        """The block after the one that is held; None at the end of an epoch."""
        rows = next(self._blocks, None)
        return None if rows is None else self._tokenised(rows)

    def _tokenised(self, rows: list[Row]) -> Examples:
        names = self._surveyed.source_names
        return tokenise_block(rows, self._tokenizer, self._config, self._max_length, names)

    def _epoch(self) -> Iterator[list[Row]]:
        """The blocks of rows of one epoch. The last one is given away only if all were as surveyed."""
        digest = _RowDigest(self._config)
        block: list[Row] = []
        for row in self._rows():
            if digest.rows == self._surveyed.rows or row.source not in self._surveyed.source_names:
                raise _changed(f"{row.where} was not there before")
            if len(block) == self._config.shuffle_rows:
                yield block
                block = []
            digest.add(row)
            block.append(row)
        if digest.rows < self._surveyed.rows:
            raise _changed(f"it had {self._surveyed.rows} rows and now has {digest.rows}")
        if digest.hexadecimal() != self._surveyed.digest:
            raise _changed("as many rows as before, but not the same")
        yield block

    def _rows(self) -> Iterator[Row]:
        try:
            yield from labelled(stream_rows(self._specs, self._config), self._config.sources)
        except UserError as error:  # the survey has found none
            raise _changed(str(error)) from error

    def _count_left_out(self) -> None:
        """Count what the block that begins has left out; each row once."""
        if self.position.epoch == 0:
            for counts, more in ((self.dropped, self._block.dropped), (self.cut, self._block.cut)):
                counts.update(Counter(counts) + Counter(more))

    def _too_few(self, usable: int, count: int) -> str:
        if usable == 0:
            return none_left(self._surveyed.rows, self._max_length)
        return (
            f"--selection.candidates is {count}, but only {usable} training examples are there "
            f"({sum(self.dropped.values())} were dropped): give at most {usable}"
        )


def digest_of(rows: Iterable[Row], config: DataConfig) -> str:
    """SHA-256 of rows that are held: that of `Survey` for the same rows."""
    digest = _RowDigest(config)
    for row in rows:
        digest.add(row)
    return digest.hexadecimal()


class _RowDigest:
    """SHA-256 of rows one after the other, and of the chat template that writes them."""

    def __init__(self, config: DataConfig):
        self.rows = 0
        self._digest = hashlib.sha256(json.dumps(read_chat_template(config)).encode())

    def add(self, row: Row) -> None:
        self.rows += 1
        messages = [(message.role, message.content) for message in row.messages or ()]
        self._digest.update(json.dumps([row.source, messages, row.prompt, row.completion, row.protected]).encode())

    def hexadecimal(self) -> str:
        return self._digest.hexdigest()


def _changed(how: str) -> TrainingError:
    return TrainingError(
        f"the training data, which must stay as it is while it is streamed, is no longer what it was at first: {how}"
    )
