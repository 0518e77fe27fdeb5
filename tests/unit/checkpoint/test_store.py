from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import shutil
import struct
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor

from colm_scale.checkpoint import store
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.errors import TrainingError, UserError
from colm_scale.randomness import generator

STATE = {"step": 20, "best": {"loss": 0.1, "step": None}, "names": ["é", "\ud800"], "empty": {}}
NAN_BITS = 0x7FC12345
"""A quiet NaN with a payload."""


def contents(mark: float = 0.0) -> dict[str, dict[str, Tensor]]:
    return {
        "adapter": {"a.weight": torch.full((2, 3), mark), "b": torch.arange(3)},
        "moments": {"first": torch.full((4,), mark)},
    }


def mark_of(checkpoint: store.Checkpoint) -> float:
    """Which of the writes this is; every tensor and the state say the same."""
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
    """Write the manifest that a write would have made of the folder as it is now, with ``changes``."""
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


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def one(path) -> Path:
    return CheckpointFolder(path, 2).write(20, STATE, contents())


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


# Killed


class Killed(BaseException):
    """As no handler of errors sees it."""


def spy_on(monkeypatch, name: str, calls: list, fail_at: int | None, after: bool, error: BaseException) -> None:
    real = getattr(os, name)

    def wrapped(*arguments, **keywords):
        calls.append((name, arguments))
        if len(calls) - 1 != fail_at:
            return real(*arguments, **keywords)
        if after:
            with suppress(FileExistsError):  # of the folder of all checkpoints, which may be there
                real(*arguments, **keywords)
        raise error

    monkeypatch.setattr(os, name, wrapped)


DURABLE = ("rename", "fsync", "mkdir", "unlink", "rmdir")
"""Every call of the operating system that a write makes to change or settle a folder."""


def calls_of(write_once, monkeypatch, fail_at: int | None = None, after: bool = False, error=None) -> list:
    """The calls of a write, the ``fail_at``-th of which raises, before or after it has done its work."""
    calls: list = []
    with monkeypatch.context() as patch:
        for name in DURABLE:
            spy_on(patch, name, calls, fail_at, after, error)
        write_once()
    return calls


def prepare(path: Path, case: str) -> tuple[int, float | None, int]:
    """A folder before a write; the step to write, the mark of the newest before it, and how many are kept."""
    folder = CheckpointFolder(path, 3)
    match case:
        case "first":
            return 20, None, 2
        case "same step, the only one":
            write(folder, 20, 1.0)
            return 20, 1.0, 1
        case "same step, one of two":
            write(folder, 10, 0.5)
            write(folder, 20, 1.0)
            return 20, 1.0, 2
        case "next, one goes":
            write(folder, 5, 0.5)
            write(folder, 10, 1.0)
            return 20, 1.0, 2
        case "next, the only one goes":
            write(folder, 10, 1.0)
            return 20, 1.0, 1
        case "after a kill in a replacement":
            write(folder, 20, 1.0)
            (path / "step-00000020").rename(path / ".step-00000020.old")
            (path / ".step-00000020.new").mkdir()
            return 20, 1.0, 1
    raise AssertionError(case)


CASES = (
    "first",
    "same step, the only one",
    "same step, one of two",
    "next, one goes",
    "next, the only one goes",
    "after a kill in a replacement",
)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_point_the_newest_is_the_one_before_or_this_one(tmp_path, monkeypatch, case, after):
    probe = tmp_path / "probe"
    step, _, keep = prepare(probe, case)
    count = len(calls_of(lambda: write(CheckpointFolder(probe, keep), step, 2.0), monkeypatch))
    assert count >= 8
    found = []
    for point in range(count):
        path = tmp_path / str(point)
        _, before, _ = prepare(path, case)
        with pytest.raises(Killed):
            calls_of(lambda: write(CheckpointFolder(path, keep), step, 2.0), monkeypatch, point, after, Killed())  # noqa: B023
        found.append(newest_mark(path))
        assert found[-1] in (before, 2.0), point
        write(CheckpointFolder(path, keep), step, 3.0)  # the run begins again
        assert newest_mark(path) == 3.0
        assert names(path) == names(probe)
        shutil.rmtree(path)
    assert found == sorted(found, key=lambda mark: mark == 2.0)  # once it is there it stays there
    assert {before, 2.0} == set(found) | {2.0}


def test_between_the_two_renames_of_a_replacement_the_replaced_one_counts(path, monkeypatch):
    folder = CheckpointFolder(path, 1)
    write(folder, 20, 1.0)
    real = os.rename

    def die_at_the_second(source, target):
        if Path(source).suffix == ".new":
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die_at_the_second)
        with pytest.raises(Killed):
            write(folder, 20, 2.0)
    assert names(path) == [".step-00000020.new", ".step-00000020.old"]
    assert newest_mark(path) == 1.0
    assert mark_of(CheckpointFolder.read(path.parent)) == 1.0
    assert names(path) == [".step-00000020.new", ".step-00000020.old"]  # reading changes nothing


def test_it_has_its_name_only_once_everything_is_on_the_disk(path, monkeypatch):
    """The manifest is the last file; every file and the folder are settled before the rename, the parent after it."""
    synced: list[str] = []
    real, real_rename = os.fsync, os.rename

    def note(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    def note_rename(source, target):
        synced.append(f"rename to {Path(target).name}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", note_rename)
    write(CheckpointFolder(path, 1), 20, 1.0)
    assert synced == [
        "run",
        "state.json",
        "adapter.safetensors",
        "moments.safetensors",
        "manifest.json",
        ".step-00000020.new",
        "rename to step-00000020",
        "checkpoints",
    ]


def test_a_half_deleted_one_is_never_found(path, monkeypatch):
    folder = CheckpointFolder(path, 1)
    write(folder, 10, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, **_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write(folder, 20, 2.0)
    assert names(path) == [".step-00000010.gone", "step-00000020"]
    shutil.rmtree(path / "step-00000020")
    assert newest_mark(path) is None
    write(folder, 30, 3.0)
    assert names(path) == ["step-00000030"]


# The disk is full


class Failing(io.BufferedWriter):
    """Takes half of what it is given."""

    def write(self, content: bytes) -> int:
        super().write(content[: len(content) // 2])
        super().flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("case", CASES[:5])
@pytest.mark.parametrize("place", range(4))
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(path, monkeypatch, case, place):
    step, before, keep = prepare(path, case)
    left = names(path) if path.exists() else []
    opened: list[Path] = []

    def open_one(file, mode):
        opened.append(file)
        return Failing(io.FileIO(file, "x")) if len(opened) == place + 1 else open(file, mode)

    with monkeypatch.context() as patch:
        patch.setattr(store, "open", open_one, raising=False)
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1234))
        with pytest.raises(TrainingError) as error:
            write(CheckpointFolder(path, keep), step, 2.0)
    assert len(opened) == place + 1
    assert names(path) == left
    assert newest_mark(path) == before
    message = str(error.value)
    assert f"{path / 'step-00000020'}" in message
    assert "No space left on device" in message
    tensor_bytes, state_bytes = 6 * 4 + 3 * 8 + 4 * 4, len('{\n "mark": 2.0\n}')
    assert f"needs {tensor_bytes + state_bytes} bytes, and 1,234 are free" in message
    assert "untouched" in message
    write(CheckpointFolder(path, keep), step, 3.0)
    assert newest_mark(path) == 3.0


@pytest.mark.parametrize("case", CASES)
def test_an_error_of_the_disk_at_any_call_leaves_a_whole_checkpoint(tmp_path, monkeypatch, case):
    probe = tmp_path / "probe"
    step, _, keep = prepare(probe, case)
    there = probe.exists()  # then nobody needs the first call, which makes it
    count = len(calls_of(lambda: write(CheckpointFolder(probe, keep), step, 2.0), monkeypatch))
    for point in range(int(there), count):
        path = tmp_path / str(point)
        _, before, _ = prepare(path, case)
        error = OSError(errno.EIO, "Input/output error")
        with pytest.raises(TrainingError, match="Input/output error"):
            calls_of(lambda: write(CheckpointFolder(path, keep), step, 2.0), monkeypatch, point, error=error)  # noqa: B023
        assert newest_mark(path) in (before, 2.0)
        assert not case.startswith("same step") or (path / "step-00000020").exists()
        write(CheckpointFolder(path, keep), step, 3.0)  # on a disk that works again
        assert newest_mark(path) == 3.0
        assert names(path) == names(probe)
        shutil.rmtree(path)


# Damaged


def test_any_flipped_bit_is_found(one):
    """In each byte of each file; the manifest is covered by no digest."""
    for file in sorted(one.iterdir()):
        whole = file.read_bytes()
        bits = torch.randint(8, (len(whole),), generator=generator(0, "flip", len(whole))).tolist()
        for place, bit in enumerate(bits):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            message = refused(one)
            assert message.startswith(f"checkpoint {one}: ")
            if file.name != "manifest.json":
                assert f"{file.name} has changed since it was written" in message
        file.write_bytes(whole)
    assert CheckpointFolder.read(one).state == STATE


@pytest.mark.parametrize("name", ["state.json", "adapter.safetensors", "moments.safetensors"])
@pytest.mark.parametrize("change", [-1, -(10**6), 1])
def test_a_truncated_or_longer_file_is_told_with_both_sizes(one, name, change):
    whole = (one / name).read_bytes()
    (one / name).write_bytes(whole[: max(0, len(whole) + change)] if change < 0 else whole + b"\0")
    found = (one / name).stat().st_size
    assert f"checkpoint {one}: {name} has {found} bytes, but {len(whole)} were written" in refused(one)


@pytest.mark.parametrize("length", [0, 1, 40, -1])
def test_a_truncated_manifest(one, length):
    (one / "manifest.json").write_bytes((one / "manifest.json").read_bytes()[:length])
    assert f"checkpoint {one}: manifest.json is not JSON" in refused(one)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "adapter.safetensors"])
def test_a_missing_file(one, name):
    (one / name).unlink()
    assert f"checkpoint {one}: {name} is missing" in refused(one)


@pytest.mark.parametrize("name", ["manifest.json", "adapter.safetensors"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file(one, name):
    (one / name).unlink()
    os.mkfifo(one / name)
    assert f"{name} is no file" in refused(one)
    (one / name).unlink()
    (one / name).mkdir()
    assert f"{name} is no file" in refused(one)


def test_a_file_that_cannot_be_read(one, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert f"checkpoint {one}: manifest.json cannot be read (Input/output error)" in refused(one)


def test_another_format_is_refused(one):
    seal(one, format=2)
    assert f"checkpoint {one}: manifest.json has format 2, but this version reads format 1" in refused(one)


@pytest.mark.parametrize("content", ["[]", "3", '{"format": 1}', '{"format": true, "files": {}}', "[" * 100_000])
def test_a_manifest_of_another_shape(one, content):
    (one / "manifest.json").write_text(content)
    assert f"checkpoint {one}: manifest.json " in refused(one)


@pytest.mark.parametrize(
    "files",
    [
        [],
        {"state.json": []},
        {"state.json": {"size": "2", "sha256": ""}},
        {"state.json": {"size": 2, "sha256": None}},
        {"state.json": {"size": 2}},
        {"state.json": {"size": 2, "sha256": "", "more": 1}},
    ],
)
def test_entries_of_another_shape(one, files):
    seal(one, files=files)
    assert f"checkpoint {one}: manifest.json is not as it was written" in refused(one)


def test_a_manifest_that_says_the_same_in_other_bytes(one):
    manifest = json.loads((one / "manifest.json").read_text())
    (one / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json is not as it was written" in refused(one)


def test_a_manifest_without_a_state(one):
    (one / "state.json").unlink()
    seal(one)
    assert "manifest.json names no state.json" in refused(one)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"loss": NaN}', "NaN is not a finite number"),
        (b'{"loss": -Infinity}', "-Infinity is not a finite number"),
        (b'{"loss": 1e999}', "1e999 is not a finite number"),
        (b'{"loss": ', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1, 2]", "is not a JSON object"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_state_that_is_no_json_object(one, content, said):
    """Its digest is right: somebody meant it."""
    (one / "state.json").write_bytes(content)
    seal(one)
    message = refused(one)
    assert f"checkpoint {one}: state.json " in message
    assert said in message


# Malicious


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("file", ["adapter.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_no_file_is_unpickled(one, tmp_path, file, form):
    marker = tmp_path / "marker"
    buffer = io.BytesIO()
    (pickle.dump if form == "pickle" else torch.save)(Payload(marker), buffer)
    (one / file).write_bytes(buffer.getvalue())
    if file != "manifest.json":
        seal(one)
    assert f"{file} is no" in refused(one)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # it would have worked


@pytest.mark.parametrize(
    "name",
    [
        "../../outside.safetensors",
        "../step-00000020/adapter.safetensors",
        "sub/adapter.safetensors",
        "./adapter.safetensors",
        "ABSOLUTE",
        "..",
        "",
        ".hidden.safetensors",
        "adapter.safetensors\n",
        "adapter.safetensors\0",
        "adapter.bin",
        "code.py",
        "other.json",
        "manifest.json",
        "\ud800.safetensors",
    ],
)
def test_a_manifest_names_files_of_its_own_folder_only(one, tmp_path, name, monkeypatch):
    outside = tmp_path / "outside.safetensors"
    shutil.copy(one / "adapter.safetensors", outside)
    name = str(outside) if name == "ABSOLUTE" else name
    files = json.loads((one / "manifest.json").read_text())["files"]
    seal(one, files={**files, name: files["adapter.safetensors"]})
    opened = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or real(path))
    assert f"manifest.json names {name!r}, which is no file of a checkpoint" in refused(one)
    assert opened == [one / "manifest.json"]


def tensor_file(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**63),
        tensor_file([]),
        tensor_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        tensor_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [2**40, 2**40 + 4]}}),
        tensor_file({"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}, bytes(1)),
        tensor_file({"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
    ],
)
def test_a_file_that_is_no_safetensors_file(one, content):
    (one / "adapter.safetensors").write_bytes(content)
    seal(one)
    assert f"checkpoint {one}: adapter.safetensors is no safetensors file" in refused(one)


def test_a_file_that_the_manifest_does_not_name_is_not_read(one):
    os.mkfifo(one / "extra.safetensors")  # opened, it would never end
    (one / ".DS_Store").write_bytes(b"\0")
    assert CheckpointFolder.read(one).tensors.keys() == {"adapter", "moments"}


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
    with pytest.raises(UserError, match="none of the 3 checkpoints is whole") as error:
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
    assert refused(three.parent) == f"{three} cannot be looked into for checkpoints: Permission denied"
