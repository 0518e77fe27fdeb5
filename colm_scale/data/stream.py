"""Streaming of training data: rows are read in blocks, one block ahead, and never held as a whole.

One pass before the run checks every row, counts the sources and computes a digest, without tokenising. Each epoch then
reads the rows again, block by block: it tokenises the block, drops or cuts what is too long, and shuffles the rest. The
examples of a step are a function of the data, the seed and a position, so that a run can resume from any position. This
module knows nothing of ranks.
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
from colm_scale.data.examples import (
    Examples,
    check_tokenizer,
    joined,
    none_left,
    read_chat_template,
    tokenise_block,
    too_few,
)
from colm_scale.data.readers import Row, each_row
from colm_scale.data.source_labels import labelled
from colm_scale.errors import TrainingError, UserError
from colm_scale.randomness import generator
from colm_scale.records import long_tensor


@dataclass(frozen=True, slots=True)
class Survey:
    """The result of one pass over the rows.

    Attributes:
        source_names: ``[Q]``, sorted by name.
        sizes: ``[Q]`` int64 rows of each source, including those that will be too long.
        protected_sizes: ``[Q]`` int64 protected rows among them.
        rows: Rows of all sources.
        digest: SHA-256, in hexadecimal, of the rows and the chat template's file, but not of file names.
        first_chat: File and line of the first chat; empty without chats.
    """

    source_names: tuple[str, ...]
    sizes: Tensor
    protected_sizes: Tensor
    rows: int
    digest: str
    first_chat: str


@dataclass(frozen=True, slots=True)
class Position:
    """The place of the next example: epoch, block of rows and example within the block, each from 0."""

    epoch: int = 0
    block: int = 0
    offset: int = 0


def survey(specs: Sequence[str], config: DataConfig) -> Survey:
    """Read and check all rows once.

    Raises:
        UserError: As `each_row` and `labelled`, or the chat template cannot be read.
    """
    sizes: Counter[str] = Counter()
    protected: Counter[str] = Counter()
    digest, first_chat = RowDigest(config), ""
    for row in digest.over(labelled(each_row(specs, config, streaming=True), config.sources)):
        sizes[row.source] += 1
        protected[row.source] += row.protected
        if row.messages and not first_chat:
            first_chat = row.where
    names = tuple(sorted(sizes))
    by_source, protected_sizes = (long_tensor([counted[name] for name in names]) for counted in (sizes, protected))
    return Survey(names, by_source, protected_sizes, sizes.total(), digest.hexadecimal(), first_chat)


class BlockStream:
    """An endless stream of examples, in which every usable one comes once per epoch.

    One block is held at a time, while a thread reads and tokenises the next. The first block is read in the
    constructor, so that most errors in the rows or the tokenizer appear before a model is loaded.

    Attributes:
        position: Place of the next example.
        dropped, cut: Examples per source that were left out or cut, counted over the blocks of the first epoch so far.

    Args:
        specs: The surveyed .jsonl files and hub data sets.
        max_length: Longest example, in tokens.

    Raises:
        UserError: The tokenizer cannot encode the rows, see `tokenise`.
        TrainingError: The rows have changed since they were surveyed.
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
        self._ahead: Future[Examples | None] = self._reader.submit(lambda: None)
        check_tokenizer(tokenizer, config, surveyed.first_chat)
        self.seek(self.position)

    def draw(self, count: int) -> Examples:
        """Return the next ``count`` examples, which may span several blocks and two epochs.

        Raises:
            UserError: A whole epoch has fewer, or the chat template fails on a row.
            TrainingError: The rows have changed since they were surveyed.
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
                    usable = count - missing
                    nothing = none_left(self._surveyed.rows, self._max_length)
                    raise UserError(too_few(count, usable, self.dropped) if usable else nothing)
        return joined(parts)

    def seek(self, position: Position) -> None:
        """Go to a `position` of this or an equal stream; the blocks before it are read, but not tokenised.

        Raises:
            UserError, TrainingError: As `draw`.
        """
        wait([self._ahead])  # it still reads from the old position
        self.position, self._blocks = position, self._epoch()
        self._hold(self._tokenised(next(islice(self._blocks, position.block, None))))

    def _next_block(self) -> None:
        del self._block, self._order  # to hold at most two blocks
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
        """Read the next block; None at the end of an epoch."""
        rows = next(self._blocks, [])
        return self._tokenised(rows) if rows else None

    def _tokenised(self, rows: list[Row]) -> Examples:
        names = self._surveyed.source_names
        return tokenise_block(rows, self._tokenizer, self._config, self._max_length, names)

    def _epoch(self) -> Iterator[list[Row]]:
        """Iterate over one epoch's blocks of rows; the last block comes only if all rows were as surveyed."""
        digest = RowDigest(self._config)
        block: list[Row] = []
        for row in self._rows():
            if digest.rows == self._surveyed.rows or row.source not in self._surveyed.source_names:
                raise _changed(f"{row.where} is new")
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
            yield from labelled(each_row(self._specs, self._config, streaming=True), self._config.sources)
        except UserError as error:  # the survey has found none
            raise _changed(str(error)) from error

    def _count_left_out(self) -> None:
        """Add what the current block has dropped and cut, in the first epoch only, so that each row counts once."""
        if self.position.epoch == 0:
            for counts, more in ((self.dropped, self._block.dropped), (self.cut, self._block.cut)):
                counts.update(Counter(counts) + Counter(more))


class RowDigest:
    """SHA-256 of the chat template and the rows, in their order.

    Attributes:
        rows, chats: Rows so far, and chats among them.
    """

    def __init__(self, config: DataConfig):
        self.rows = self.chats = 0
        self._digest = hashlib.sha256(json.dumps(read_chat_template(config)).encode())

    def add(self, row: Row) -> None:
        self.rows += 1
        self.chats += bool(row.messages)
        messages = [(message.role, message.content) for message in row.messages]
        self._digest.update(json.dumps([row.source, messages, row.prompt, row.completion, row.protected]).encode())

    def over(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows on, and add each."""
        for row in rows:
            self.add(row)
            yield row

    def hexadecimal(self) -> str:
        return self._digest.hexdigest()


def _changed(how: str) -> TrainingError:
    return TrainingError(f"the training data has changed since the run first read it to stream it: {how}")
