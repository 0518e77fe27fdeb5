"""Rows as points: by what a model makes of them, or by their words.

    n  rows        c  numbers of a row
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from colm_scale.config import LoraConfig
from colm_scale.config.commands import SourcesOptions
from colm_scale.data.examples import encode
from colm_scale.data.readers import Row
from colm_scale.errors import UserError
from colm_scale.modeling.causal import CausalModel, base_of
from colm_scale.modeling.embedding import embed
from colm_scale.modeling.load import add_adapters, check_model, context_length, load_model, load_tokenizer

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

_SVD = 128
"""Dimensions that TF-IDF is reduced to."""
_WORDS = 20_000
"""Most words that TF-IDF knows, the most frequent."""


class States:
    """The mean of a model's last hidden states over the tokens of a row.

    Attributes:
        cut: Rows, so far, of which only the first ``--data.max_length`` tokens were looked at.
        scaled: Whether each number of a state is to count alike: in many models a few are larger than all others.

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
        self._model = _load(options)
        self.name = options.model.name or "the built-in base"
        if options.adapter is not None:
            self.name += f" with {options.adapter}"

    def __call__(self, rows: Sequence[Row]) -> np.ndarray:
        """``[n, c]`` float32.

        Raises:
            UserError: The tokenizer cannot write a row, see `data.examples.tokenise`.
        """
        tokens = [encoded.tokens for encoded in encode(rows, self._tokenizer, self._data)]
        self.cut += sum(len(row) > self._longest for row in tokens)
        cut = [torch.from_numpy(row[: self._longest]).long() for row in tokens]
        return embed(self._model, cut, self._budget).numpy()


class Words:
    """TF-IDF of a row's words, reduced to at most 128 numbers by a singular value decomposition, of length 1.

    Args:
        some: Rows from which the words and their weights are learned.
    """

    name, cut = "TF-IDF", 0
    scaled = False  # a component says how much by its size

    def __init__(self, some: Iterable[Row], seed: int):
        from sklearn.decomposition import TruncatedSVD
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer

        tf_idf = term_weights()
        found = tf_idf.fit_transform([text_of(row) for row in some])
        svd = TruncatedSVD(min(_SVD, found.shape[1] - 1), random_state=seed).fit(found)
        self._pipeline = make_pipeline(tf_idf, svd, Normalizer())

    def __call__(self, rows: Sequence[Row]) -> np.ndarray:
        """``[n, c]`` float32."""
        found: np.ndarray = self._pipeline.transform([text_of(row) for row in rows]).astype(np.float32)
        return found


def term_weights() -> TfidfVectorizer:
    """TF-IDF of single words; also where another clustering is to be compared with the usual one."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(max_features=_WORDS, sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]", dtype=np.float32)


def text_of(row: Row) -> str:
    """All that is written in a row."""
    if row.messages:
        return "\n".join(message.content for message in row.messages)
    return row.prompt + row.completion


Embedder = States | Words


def _load(options: SourcesOptions) -> CausalModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: CausalModel = load_model(options.model, getattr(torch, options.dtype), device)
    if options.adapter is not None:
        try:
            model = add_adapters(base_of(model), LoraConfig(adapter=options.adapter), options.seed)
        except UserError as error:
            raise UserError(str(error).replace("--lora.adapter", "--adapter")) from None
    model.eval()
    return model
