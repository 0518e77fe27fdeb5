from __future__ import annotations

import pytest
from support.threads import on_ranks


@pytest.mark.parametrize("texts", [["a", "", "é" * 300], ["", "", ""], ["\udcff/x", "b", "c"]])
def test_every_rank_gets_the_texts_of_all(texts):
    """Also those that are no UTF-8, as the names of files may be."""
    assert on_ranks(3, lambda group: group.texts(texts[group.rank])) == [texts] * 3
