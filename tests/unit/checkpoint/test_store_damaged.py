"""A checkpoint of which anything has changed is refused by name, and none runs code."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from support.checkpoints import STATE, refused, seal

from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.randomness import generator


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
    assert f"{name} is not a file" in refused(one)
    (one / name).unlink()
    (one / name).mkdir()
    assert f"{name} is not a file" in refused(one)


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
    assert f"manifest.json names {name!r}, which is not a checkpoint file" in refused(one)
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
    assert f"checkpoint {one}: adapter.safetensors is not a safetensors file" in refused(one)


def test_a_file_that_the_manifest_does_not_name_is_not_read(one):
    os.mkfifo(one / "extra.safetensors")  # opened, it would never end
    (one / ".DS_Store").write_bytes(b"\0")
    assert CheckpointFolder.read(one).tensors.keys() == {"adapter", "moments"}
