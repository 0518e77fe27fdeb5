"""Tokens of rows, with a mark on every token that carries loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from colm_scale.config import RowConfig
from colm_scale.data.chats import ChatTemplate, RenderedChat, Span
from colm_scale.data.hub import hub_answers
from colm_scale.data.readers import Row
from colm_scale.errors import UserError

_ROWS_AT_ONCE = 4096
"""Rows tokenised in one call: enough to keep its threads busy, few enough to bound its lists of Python ints."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row's tokens.

    Attributes:
        tokens, labelled: ``[T]`` int32, and ``[T]`` bool, True on tokens that carry loss.
        text, spans: What the tokens stand for, and its parts that carry loss.
        left_out: Keys of messages whose text the chat template leaves out.
        ends: Whether every learned part ends in an end token.
    """

    row: Row
    tokens: np.ndarray
    labelled: np.ndarray
    text: str
    spans: tuple[Span, ...]
    left_out: tuple[str, ...] = ()
    ends: bool = True

    @property
    def learned(self) -> list[str]:
        """The parts that carry loss."""
        return [self.text[begin:end] for begin, end in self.spans]


def encode(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, config: RowConfig) -> Iterator[Encoded]:
    """Tokenise every row, in order and whatever its length.

    A prompt starts with the tokenizer's own leading special tokens, and a completion ends with its end-of-sequence
    token, unless they were written with them; the two are tokenised apart, so that no token straddles their border. A
    chat is rendered by its template and tokenised as a whole.

    Raises:
        UserError: As `data.examples.tokenise`.
    """
    check_tokenizer(tokenizer, config, first_chat="")
    texts, left = _Texts(tokenizer), iter(rows)
    while batch := list(islice(left, _ROWS_AT_ONCE)):
        first_chat = next((row.where for row in batch if row.messages), "")
        chats = _Chats(tokenizer, check_tokenizer(tokenizer, config, first_chat), config)
        of_chats = chats.encode([row for row in batch if row.messages])
        of_texts = texts.encode([row for row in batch if not row.messages])
        for row in batch:
            yield next(of_chats if row.messages else of_texts)


class _Texts:
    """Encodes prompts with their completions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._leading, self._eos = leading_special_tokens(tokenizer), [tokenizer.eos_token_id]
        self._begin = str(tokenizer.decode(self._leading)) if self._leading else ""

    def encode(self, rows: Sequence[Row]) -> Iterator[Encoded]:
        ids = iter(plain_ids(self._tokenizer, [text for row in rows for text in (row.prompt, row.completion)]))
        end = str(self._tokenizer.eos_token)
        for row in rows:
            prompt, completion = next(ids), next(ids)
            before, learned = row.prompt, row.completion
            if (prompt or completion)[: len(self._leading)] != self._leading:  # else it was written with them
                prompt, before = [*self._leading, *prompt], f"{self._begin}{before}"
            if not learned.rstrip().endswith(end):
                completion, learned = [*completion, *self._eos], f"{learned}{end}"
            labelled = np.repeat([False, True], [len(prompt), len(completion)])
            labelled[:1] = False
            span = len(before), len(before) + len(learned)
            tokens = np.array([*prompt, *completion], dtype=np.int32)
            yield Encoded(row, tokens, labelled, before + learned, (span,))


class _Chats:
    """Encodes chats: each is rendered once and tokenised once.

    If a learned part begins or ends inside a token, the text is tokenised apart there: a prompt that is tokenised for
    generation must be a prefix of what is trained.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, config: RowConfig):
        self._tokenizer = tokenizer
        self._template = ChatTemplate(template, tokenizer.special_tokens_map, _moment(config))
        self._ends = end_tokens(tokenizer)
        self._stops = tuple(end for end in self._ends if end != tokenizer.bos_token)
        self._refuses = config.left_out == "refuse"
        self._newline = plain_ids(tokenizer, ["\n"])[0]

    def encode(self, rows: Sequence[Row]) -> Iterator[Encoded]:
        if not rows:
            return
        chats = [self._with_stops(self._template.render(row)) for row in rows]
        fast = self._tokenizer.is_fast
        whole = self._tokenizer(
            [chat.text for chat in chats],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=fast,
            verbose=False,
        )
        for place, (row, chat) in enumerate(zip(rows, chats)):
            if chat.left_out and self._refuses:
                raise UserError(
                    f"{row.where}: the chat template leaves out {', '.join(chat.left_out)}: it would not be learned. "
                    "Use a template that writes it (--data.chat_template FILE), or let such rows pass and be counted, "
                    "with --data.left_out count"
                )
            borders = np.array([border for span in chat.learned for border in span], dtype=np.int64)
            tokens, labelled = np.array(whole["input_ids"][place], dtype=np.int32), None
            if fast:
                labelled = _labelled(np.array(whole["offset_mapping"][place]).reshape(-1, 2), borders, len(chat.text))
            if labelled is None:
                tokens, labelled = self._apart(chat)
            labelled[:1] = False
            ends = all(chat.text[begin:end].rstrip().endswith(self._ends) for begin, end in chat.learned)
            yield Encoded(row, tokens, labelled, chat.text, chat.learned, chat.left_out, ends)

    def _with_stops(self, chat: RenderedChat) -> RenderedChat:
        """Let a turn without an end token end in the one that begins the next turn: GLM's models stop there.

        Marks of the template's own stay as they are.
        """
        if chat.marked:
            return chat
        spans = []
        for begin, end in chat.learned:
            stop = "" if chat.text[begin:end].rstrip().endswith(self._ends) else self._stop_at(chat.text, end)
            spans.append((begin, end + len(stop)))
        return replace(chat, learned=tuple(spans))

    def _stop_at(self, text: str, place: int) -> str:
        return next((stop for stop in self._stops if text.startswith(stop, place)), "")

    def _apart(self, chat: RenderedChat) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise each learned part, and what stands between, on its own."""
        borders = [0, *(border for span in chat.learned for border in span), len(chat.text)]
        pieces = [self._continued(chat.text[begin:end], first=not begin) for begin, end in pairwise(borders)]
        tokens = np.fromiter(chain.from_iterable(pieces), dtype=np.int32)
        marks = np.arange(len(pieces)) % 2 == 1
        return tokens, np.repeat(marks, [len(ids) for ids in pieces])

    def _continued(self, text: str, *, first: bool) -> list[int]:
        """Tokenise a text that follows another: some tokenizers put a blank before whatever they are given."""
        if not first and text:
            (ids,) = plain_ids(self._tokenizer, [f"\n{text}"])
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return plain_ids(self._tokenizer, [text])[0]


def _labelled(offsets: np.ndarray, borders: np.ndarray, length: int) -> np.ndarray | None:
    """Mark the tokens of learned parts; None if a part begins or ends inside a token.

    Args:
        offsets: ``[T, 2]`` begin and end of each token in the text, of ``length`` characters.
        borders: ``[2 k]`` begin and end of each learned part, in order.
    """
    begins, reached = offsets[:, 0], np.maximum.accumulate(offsets[:, 1])
    before = np.searchsorted(begins, borders)  # tokens that begin before the border
    inside = (borders > 0) & (borders < length)
    if (reached[before[inside] - 1] != borders[inside]).any():
        return None
    return np.asarray(np.searchsorted(borders, begins, side="right") % 2 == 1)


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenise texts, without adding special tokens."""
    if not texts:
        return []
    # Not verbose: texts above the model's context are counted here, and need no warning.
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _moment(config: RowConfig) -> datetime:
    return datetime.fromisoformat(config.now) if config.now else datetime.now()


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """List the tokens at which the model stops to generate.

    They are the tokenizer's end token and those of the model's ``generation_config.json``. If the model has no such
    file, each special token may be one.
    """
    stops = _generation_stops(tokenizer.name_or_path)
    added = tokenizer.added_tokens_decoder
    ends = (token.content for number, token in added.items() if (number in stops if stops else token.special))
    return str(tokenizer.eos_token), *ends


@lru_cache
def _generation_stops(name: str) -> frozenset[int]:
    """Read the ids at which a model stops to generate; none if it does not say."""
    if not name:  # made in memory
        return frozenset()
    try:
        local = not Path(name).is_dir() and not hub_answers()
        found = GenerationConfig.from_pretrained(name, local_files_only=local).eos_token_id
    except Exception:  # there is no such file, or the hub fails in one of its ways
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found or ())


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens put before a text, often a begin-of-sequence token; those put after it are left out."""
    text = "a"
    whole: list[int] = tokenizer(text)["input_ids"]
    (plain,) = plain_ids(tokenizer, [text])
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
        own = tokenizer.chat_template
        lacks = f"chat templates ({', '.join(own)}), none of which is called 'default'" if own else "no chat template"
        raise UserError(
            f"{first_chat} is a chat, but the model's tokenizer has {lacks}: give one with --data.chat_template FILE"
        ) from error


def read_chat_template(config: RowConfig) -> str | None:
    """Read the file ``--data.chat_template``; None if the option is not given."""
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data.chat_template {config.chat_template} cannot be read: {error}") from error
