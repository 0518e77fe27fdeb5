from __future__ import annotations

from pathlib import Path

import pytest

from colm_scale.config.cache import cache_folder


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"COLM_SCALE_CACHE": "/fast", "XDG_CACHE_HOME": "/caches", "HOME": "/me"}, "/fast"),
        ({"XDG_CACHE_HOME": "/caches", "HOME": "/me"}, "/caches/colm_scale"),
        ({"COLM_SCALE_CACHE": "here"}, str(Path("here").absolute())),
        ({"COLM_SCALE_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/me"}, "/me/.cache/colm_scale"),
    ],
)
def test_the_folder_is_among_the_users_caches(environ, expected):
    assert cache_folder(environ) == Path(expected)
