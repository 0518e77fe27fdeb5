"""What is written comes back, and the right one is found."""

from __future__ import annotations

import errno
import json
import math
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from support.checkpoints import STATE, mark_of, names, newest_mark, refused, write
from torch import Tensor

from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.errors import UserError

NAN_BITS = 0x7FC12345
"""A quiet NaN with a payload."""


# What is written comes back


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def odd_tensors() -> dict[str, Tensor]:
    whole = torch.arange(12.0)
    return {
        "nan": torch.tensor([NAN_BITS, NAN_BITS - 2**32 + 2**31], dtype=torch.int32).view(torch.float32),
        "bfloat16 nan": torch.tensor([0x7FC1, -0x3E], dtype=torch.int16).view(torch.bfloat16),
        "zeros": torch.tensor([-0.0, 0.0, math.inf, -math.inf]),
        "denormal": torch.tensor([1e-45, -1e-45]),
        "int64": torch.tensor([2**63 - 1, -(2**63)]),
        "bool": torch.tensor([True, False]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "float64": torch.tensor([math.pi], dtype=torch.float64),
        "float16": torch.tensor([6e-8], dtype=torch.float16),
        "scalar": torch.tensor(3.5),
        "integer scalar": torch.tensor(7),
        "empty": torch.zeros(0),
        "empty matrix": torch.zeros(3, 0, 2, dtype=torch.bfloat16),
        "learned": torch.nn.Parameter(torch.ones(2)),
        "whole": whole,
        "the same": whole,
        "overlaps": whole[3:7],
        "transposed": whole.view(3, 4).t(),
        "expanded": torch.ones(1).expand(5),
        "with dots/and, a slash": torch.ones(1),
    }


def test_tensors_come_back_bit_by_bit(path):
    tensors = {"odd": odd_tensors(), "nothing": {}, "optimizer-1_x": {"step": torch.tensor(3.0)}}
    assert torch.isnan(tensors["odd"]["nan"]).all()
    back = CheckpointFolder.read(CheckpointFolder(path, 1).write(3, {}, tensors)).tensors
    assert back.keys() == tensors.keys()
    for stem, named in tensors.items():
        assert back[stem].keys() == named.keys()
        for name, tensor in named.items():
            assert bits(back[stem][name]) == bits(tensor.detach()), name


def test_the_state_comes_back(one):
    found = CheckpointFolder.read(one)
    assert found.state == STATE
    assert found.path == one
    assert found.passed_over == ()


def test_a_checkpoint_without_tensors(path):
    found = CheckpointFolder.read(CheckpointFolder(path, 1).write(1, {"a": [1, 2.5]}, {}))
    assert (found.state, found.tensors) == ({"a": [1, 2.5]}, {})


def test_what_was_read_does_not_hang_on_the_files(one):
    tensors = CheckpointFolder.read(one).tensors
    for file in one.iterdir():
        file.write_bytes(b"")
    assert tensors["adapter"]["b"].tolist() == [0, 1, 2]
    tensors["adapter"]["b"].add_(1)


def test_the_folder_holds_these_files_and_its_manifest_all_others(one):
    assert names(one) == ["adapter.safetensors", "manifest.json", "moments.safetensors", "state.json"]
    manifest = json.loads((one / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert names(one) == sorted([*manifest["files"], "manifest.json"])
    for name, entry in manifest["files"].items():
        content = (one / name).read_bytes()
        assert entry == {"size": len(content), "sha256": sha256(content).hexdigest()}


def test_a_state_with_a_nan_is_refused_before_the_disk_is_touched(path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        CheckpointFolder(path, 1).write(1, {"loss": math.nan}, {})
    assert not path.exists()


# Which are kept, which is found


def test_none_without_any(path):
    assert CheckpointFolder(path, 1).newest(fallback=False) is None
    path.mkdir(parents=True)
    (path / "notes.txt").touch()
    assert CheckpointFolder(path, 1).newest(fallback=True) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(path, keep):
    folder = CheckpointFolder(path, keep)
    for step in (5, 99_999_999, 100_000_000, 1_000_000_000):  # as text, the last two sort before the second
        assert write(folder, step, step) == path / f"step-{step:08d}"
        assert mark_of(folder.newest(fallback=False)) == step
    last = ["step-00000005", "step-99999999", "step-100000000", "step-1000000000"][-keep:]
    assert names(path) == sorted(last)


def test_what_is_no_checkpoint_stays(path):
    path.mkdir(parents=True)
    others = ["notes.txt", ".hidden", "step-5", "step-00000005.bak", ".step-00000005.tmp"]
    for name in others:
        (path / name).mkdir()
    write(CheckpointFolder(path, 1), 9, 1.0)
    assert names(path) == sorted([*others, "step-00000009"])


def test_the_same_step_is_replaced(path):
    folder = CheckpointFolder(path, 2)
    write(folder, 10, 1.0)
    write(folder, 20, 2.0)
    write(folder, 20, 3.0)
    assert newest_mark(path) == 3.0
    assert names(path) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_run_that_went_back_finds_what_it_writes_then(path, keep):
    folder = CheckpointFolder(path, 3)
    for step in (10, 20, 30):
        write(folder, step, step)
    write(CheckpointFolder(path, keep), 15, -1.0)
    assert newest_mark(path) == -1.0
    assert names(path) == ["step-00000010", "step-00000015"][-keep:]


# Damaged ones among others


@pytest.fixture
def three(path) -> Path:
    folder = CheckpointFolder(path, 3)
    for step in (10, 20, 30):
        write(folder, step, step)
    return path


def damage(path: Path, *steps: int) -> None:
    for step in steps:
        (path / f"step-{step:08d}" / "moments.safetensors").write_bytes(b"")


def test_a_damaged_newest_one_stops_the_run_with_the_way_out(three):
    damage(three, 30)
    with pytest.raises(UserError) as error:
        CheckpointFolder(three, 3).newest(fallback=False)
    message = str(error.value)
    assert message.startswith(f"checkpoint {three / 'step-00000030'}: moments.safetensors has 0 bytes, but ")
    assert "--checkpoint.fallback true" in message
    assert "--resume" in message


def test_an_older_damaged_one_is_nobodys_business(three):
    damage(three, 10, 20)
    assert newest_mark(three) == 30


def test_with_fallback_the_newest_whole_one_is_found_and_says_which_were_not(three):
    damage(three, 30, 20)
    found = CheckpointFolder(three, 3).newest(fallback=True)
    assert mark_of(found) == 10
    assert [text.split(":")[0] for text in found.passed_over] == [
        f"checkpoint {three / 'step-00000030'}",
        f"checkpoint {three / 'step-00000020'}",
    ]


def test_with_fallback_and_none_whole_the_run_does_not_silently_begin_anew(three):
    damage(three, 10, 20, 30)
    with pytest.raises(UserError, match="all 3 checkpoints are damaged") as error:
        CheckpointFolder(three, 3).newest(fallback=True)
    assert all(f"step-000000{step}" in str(error.value) for step in (10, 20, 30))


def test_after_a_fallback_the_damaged_one_is_not_found_again(three):
    damage(three, 30)
    folder = CheckpointFolder(three, 2)
    assert mark_of(folder.newest(fallback=True)) == 20
    write(folder, 25, 25)
    assert names(three) == ["step-00000020", "step-00000025"]
    assert mark_of(folder.newest(fallback=False)) == 25


# By path


def test_a_checkpoint_or_the_newest_of_a_run(three):
    assert mark_of(CheckpointFolder.read(three / "step-00000010")) == 10
    assert mark_of(CheckpointFolder.read(three.parent)) == 30


def test_a_copy_of_another_name_is_read(three, tmp_path):
    shutil.copytree(three / "step-00000020", tmp_path / "mine")
    assert mark_of(CheckpointFolder.read(tmp_path / "mine")) == 20


def test_the_newest_of_a_run_is_not_silently_another(three):
    damage(three, 30)
    assert f"checkpoint {three / 'step-00000030'}: moments.safetensors" in refused(three.parent)


def test_a_folder_that_is_neither(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert refused(tmp_path / "none") == f"--resume {tmp_path / 'none'}: there is no such folder"
    assert "there is no such folder" in refused(tmp_path / "file")
    assert refused(tmp_path).startswith(f"--resume {tmp_path} is neither a checkpoint")
    assert "has written no checkpoint" in refused(tmp_path / "run")


def test_a_folder_that_cannot_be_looked_into(three, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", fail)
    assert refused(three.parent) == f"{three} cannot be searched for checkpoints: Permission denied"
