"""Small checkpoints that identify the write that made them."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor

from colm_scale.checkpoint.files import Checkpoint
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.errors import UserError

STATE = {"step": 20, "best": {"loss": 0.1, "step": None}, "names": ["é", "\ud800"], "empty": {}}


def contents(mark: float = 0.0) -> dict[str, dict[str, Tensor]]:
    return {
        "adapter": {"a.weight": torch.full((2, 3), mark), "b": torch.arange(3)},
        "moments": {"first": torch.full((4,), mark)},
    }


def mark_of(checkpoint: Checkpoint) -> float:
    """Number of the write; state and all tensors must agree."""
    marks = {checkpoint.state["mark"], *checkpoint.tensors["adapter"]["a.weight"].flatten().tolist()}
    (mark,) = marks | set(checkpoint.tensors["moments"]["first"].tolist())
    return mark


def write(folder: CheckpointFolder, step: int, mark: float) -> Path:
    return folder.write(step, {"mark": mark}, contents(mark))


def newest_mark(path: Path) -> float | None:
    found = CheckpointFolder(path, 1).newest(fallback=False)
    return None if found is None else mark_of(found)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def seal(path: Path, **changes: object) -> None:
    """Write a manifest for the current content of the folder, with ``changes``."""
    files = {
        entry.name: {"size": entry.stat().st_size, "sha256": sha256(entry.read_bytes()).hexdigest()}
        for entry in sorted(path.iterdir())
        if entry.name != "manifest.json"
    }
    manifest = {"format": 1, "files": files, **changes}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        CheckpointFolder.read(path)
    assert "\n" not in str(error.value)
    return str(error.value)
