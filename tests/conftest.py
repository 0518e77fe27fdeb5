"""For all tests: no network, nor in what they start; one process that runs are forked from; what workers share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support.commands import Forked

TESTS = Path(__file__).parent
FINE = ("unit", "parity")
"""Folders whose tests are dealt out to workers one by one; a file of the others shares the runs that it starts."""

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("full", deadline=None)  # a busy machine is no failure
settings.register_profile("quick", deadline=None, max_examples=15)
settings.load_profile("full")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file that starts runs on one worker of ``--dist loadgroup``."""
    for item in items:
        file = item.path.relative_to(TESTS)
        if file.parts[0] not in FINE:
            item.add_marker(pytest.mark.xdist_group(file.as_posix()))


@pytest.fixture(scope="session")
def forked(tmp_path_factory) -> Iterator[Forked]:
    """What runs and commands are forked from where the process itself is not what a test is about."""
    with Forked(tmp_path_factory.mktemp("forked")) as started:
        yield started
