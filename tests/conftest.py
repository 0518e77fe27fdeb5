"""For all tests: no network, and a cache of their own, nor others in what they start; and one process that runs are
forked from."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from support.commands import Forked

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("full", deadline=None)  # a busy machine is no failure
settings.register_profile("quick", deadline=None, max_examples=15)
settings.load_profile("full")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory) -> None:
    os.environ["COLM_SCALE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def forked(tmp_path_factory) -> Iterator[Forked]:
    """What runs and commands are forked from where the process itself is not what a test is about."""
    with Forked(tmp_path_factory.mktemp("forked")) as started:
        yield started
