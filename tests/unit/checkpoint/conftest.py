from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import STATE, contents

from colm_scale.checkpoint.store import CheckpointFolder


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def one(path) -> Path:
    return CheckpointFolder(path, 2).write(20, STATE, contents())
