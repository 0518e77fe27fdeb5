"""From the user's data to tokenised examples: out of the cache, or else out of the rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from colm_scale import __version__
from colm_scale.base import MIXTURE
from colm_scale.config import DataConfig
from colm_scale.config.cache import CACHE_VARIABLE, cache_folder
from colm_scale.data.builtin import Split, builtin_as_rows
from colm_scale.data.encoding import end_tokens, leading_special_tokens, read_chat_template
from colm_scale.data.examples import tokenise
from colm_scale.data.files import default_sources, files_of
from colm_scale.data.formats import identity
from colm_scale.data.readers import Columns, Row, each_row
from colm_scale.data.source_labels import labelled
from colm_scale.data.stream import RowDigest
from colm_scale.data.tokenised import Damaged, NotStored, TokenFolder, Tokenised

_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_APART = ("train", "eval", "sources", "chat_template", "now")
"""Options that name files, whose content matters instead, and the date, since nothing that shows it is stored."""
_CHANGEABLE = re.compile(r"strftime_now|random|lipsum")
"""What makes a chat template render differently at another time."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Data to be read, and all that its tokens depend on.

    Attributes:
        max_length: Longest example, in tokens.
        source_names: For held-out data, the sources of the training data; see `tokenise`.
    """

    split: Split
    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    source_names: tuple[str, ...] = ()

    @property
    def _specs(self) -> list[str]:
        return getattr(self.config, self.split) or []

    def rows(self, columns: Columns) -> Iterator[Row]:
        """Read the rows one by one; without files, those of the built-in mixture.

        Args:
            columns: Notes the columns that are not read.

        Raises:
            UserError: As `each_row` and `labelled`; or, at the end, no training file has a column that was named.
        """
        rows: Iterable[Row] = each_row(self._specs, self.config, columns)
        if not self._specs:
            rows = builtin_as_rows(self.split, self.config)
        yield from labelled(rows, self.config.sources if self.split == "train" else None)
        if self._specs and self.split == "train":
            columns.check(self.config)

    def tokenised(self) -> Tokenised:
        """Read and tokenise the rows.

        Raises:
            UserError: As `each_row`, `labelled` and `tokenise`.
        """
        digest, columns = RowDigest(self.config), Columns()
        rows = digest.over(self.rows(columns))
        examples = tokenise(rows, self.tokenizer, self.config, self.max_length, self.source_names)
        templates = json.dumps(_templates(self.tokenizer, self.config))
        lasting = not (digest.chats and _CHANGEABLE.search(templates))
        notes = tuple(columns.lines())
        return Tokenised(examples, examples.digest(), digest.hexadecimal(), notes, lasting=lasting)

    def key(self) -> str:
        """Return a SHA-256 of all that the tokens depend on, in hexadecimal; empty if it is not known to be all."""
        files = [file for spec in self._specs for file in files_of(spec)] or [str(MIXTURE / f"{self.split}.jsonl.gz")]
        sources = default_sources(files)
        if self.split == "train" and self.config.sources:
            files = [*files, self.config.sources]
        options = {name: value for name, value in asdict(self.config).items() if name not in _APART}
        facts = [
            *(_code(), _tokenizer_facts(self.tokenizer), _templates(self.tokenizer, self.config)),
            *map(identity, files),
            *([self.split, self.max_length, self.source_names, sources], options),
        ]
        return "" if None in facts else hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _code() -> list[str]:
    """Return what changes with the code that makes tokens: versions, and the digest of this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return [__version__, digest.hexdigest(), *map(metadata.version, _LIBRARIES)]


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> list[object] | None:
    """Return a tokenizer's content; None for one that is Python code, or brings its own."""
    kind, backend = type(tokenizer), getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or kind.__module__.split(".")[0] != "transformers":
        return None
    leading = leading_special_tokens(tokenizer)  # using it resets what its file says of truncation and padding
    special = {**tokenizer.special_tokens_map, "extra": [str(token) for token in tokenizer.extra_special_tokens]}
    whole = tokenizer.split_special_tokens
    return [kind.__qualname__, backend.to_str(), leading, tokenizer.eos_token_id, special, whole, end_tokens(tokenizer)]


def _templates(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[object]:
    return [read_chat_template(config), tokenizer.chat_template]


def find_or_read(reading: Reading, spare: Sequence[Path], warn: Callable[[str], None]) -> Tokenised:
    """Return tokenised data from the cache; else read the rows, and store their tokens there.

    Args:
        spare: Folders for tokens that the cache cannot hold; without any, these are only returned.
        warn: Receives a line for each folder that cannot hold them.

    Raises:
        UserError: As `Reading.tokenised`.
    """
    cache, key = TokenFolder(cache_folder() / "tokens"), reading.key()
    try:
        if key and (found := cache.find(key)):
            return found
    except Damaged as error:
        warn(f"warning: {error}: the data is tokenised again")
    read = reading.tokenised()
    storable = key and read.lasting and key == reading.key()  # another key: a file has changed while it was read
    for folder in [*([cache] if storable else []), *map(TokenFolder, spare)]:
        try:
            return folder.store(key or read.digest, read)
        except NotStored as error:
            hint = f"; {CACHE_VARIABLE} names another folder" if folder is cache else ""
            warn(f"warning: {error}{hint}")
    return read
