"""What the files here share: runs of one process and of two, made when the first test of a file asks for them.

A file says in ``PAIRS`` which case of `support.worker` runs under which engine on two ranks, and in ``CASES`` which run
alone. A file with other needs has fixtures of its own under the same names.
"""

from __future__ import annotations

import pytest
import torch
from support import worker


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the ranks, and tiny models are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(request, tmp_path_factory) -> dict[str, dict]:
    """By case, the result of one process."""
    jobs = {case: ("auto", case) for case in request.module.CASES}
    return worker.launch(1, jobs, tmp_path_factory.mktemp("alone"))[0]["cases"]


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory) -> list[dict[str, dict]]:
    """By rank, the result of each ``engine/case``."""
    jobs = {f"{engine}/{case}": (engine, case) for engine, case in request.module.PAIRS}
    return [rank["cases"] for rank in worker.launch(2, jobs, tmp_path_factory.mktemp("two"))]
