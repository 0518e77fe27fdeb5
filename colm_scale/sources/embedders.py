"""Embeddings of rows: hidden states of a model, or TF-IDF of their words.

    n  rows        c  width of an embedding
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from colm_scale.config import LoraConfig
from colm_scale.config.commands import SourcesOptions
from colm_scale.data.encoding import encode
from colm_scale.data.readers import Row
from colm_scale.errors import UserError
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.causal import CausalModel, base_of
from colm_scale.modeling.embedding import embed
from colm_scale.modeling.load import check_model, context_length, load_model, load_tokenizer

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

_SVD = 128
"""Dimensions to which TF-IDF is reduced."""
_WORDS = 20_000
"""Words of TF-IDF, the most frequent."""


class States:
    """Embeds a row as the mean of a model's last hidden states over its tokens.

    Attributes:
        cut: Rows, so far, of which only the first ``--data.max_length`` tokens were embedded.
        scaled: True: dimensions are to be standardised, since in many models a few are larger than all others.

    Raises:
        UserError: There is no such model or adapter.
    """

    scaled = True

    def __init__(self, options: SourcesOptions):
        self.cut = 0
        config = check_model(options.model)
        self._data, self._budget = options.data, options.batch_tokens
        self._longest = options.data.max_length or context_length(config)
        self._tokenizer = load_tokenizer(options.model)
        self.name = options.model.name or "the built-in base"
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: CausalModel = load_model(options.model, getattr(torch, options.dtype), device)
        if options.adapter:
            self.name += f" with {options.adapter}"
            self._model = _adapted(self._model, options.adapter, options.seed)
        self._model.eval()

    def __call__(self, rows: Sequence[Row]) -> np.ndarray:
        """Embed rows, ``[n, c]`` float32.

        Raises:
            UserError: The tokenizer cannot encode a row, see `data.examples.tokenise`.
        """
        tokens = [encoded.tokens for encoded in encode(rows, self._tokenizer, self._data)]
        self.cut += sum(len(row) > self._longest for row in tokens)
        cut = [torch.from_numpy(row[: self._longest]).long() for row in tokens]
        return embed(self._model, cut, self._budget).numpy()


class Words:
    """Embeds a row as TF-IDF of its words, reduced to at most 128 dimensions by SVD and scaled to length 1.

    Args:
        some: Rows from which the words and their weights are learned.
    """

    name, cut = "TF-IDF", 0
    scaled = False  # larger components matter more

    def __init__(self, some: Iterable[Row], seed: int):
        from sklearn.decomposition import TruncatedSVD
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer

        tf_idf = term_weights()
        found = tf_idf.fit_transform([text_of(row) for row in some])
        svd = TruncatedSVD(min(_SVD, found.shape[1] - 1), random_state=seed).fit(found)
        self._pipeline = make_pipeline(tf_idf, svd, Normalizer())

    def __call__(self, rows: Sequence[Row]) -> np.ndarray:
        """Embed rows, ``[n, c]`` float32."""
        found: np.ndarray = self._pipeline.transform([text_of(row) for row in rows]).astype(np.float32)
        return found


def term_weights() -> TfidfVectorizer:
    """Create TF-IDF of single words and punctuation marks."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(max_features=_WORDS, sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]", dtype=np.float32)


def text_of(row: Row) -> str:
    """Join all text of a row."""
    if row.messages:
        return "\n".join(message.content for message in row.messages)
    return row.prompt + row.completion


Embedder = States | Words


def _adapted(model: CausalModel, adapter: str, seed: int) -> CausalModel:
    try:
        return add_adapters(base_of(model), LoraConfig(adapter=adapter), seed)
    except UserError as error:
        raise UserError(str(error).replace("--lora.adapter", "--adapter")) from None
