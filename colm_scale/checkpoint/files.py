"""The files of one checkpoint, written without another copy of the tensors and verified before anything is used.

    state.json                plain JSON
    adapter.safetensors, ...  tensors by name, one file per stem
    manifest.json             format, and size and SHA-256 of every other file; written last

Nothing is unpickled: JSON and safetensors hold only data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from colm_scale.records import Json

MANIFEST = "manifest.json"
_FORMAT = 1
_STATE, _TENSORS = "state.json", ".safetensors"
_FILE_NAME = re.compile(r"\w[\w-]*\.safetensors|state\.json", re.ASCII)
Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file stem and name."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The verified content of a checkpoint's folder.

    Attributes:
        path: The folder.
        state: Content of ``state.json``.
        tensors: By file stem ("adapter", "optimizer", ...) and name, on the CPU.
        passed_over: Damage of each newer checkpoint that was skipped.
    """

    path: Path
    state: Json
    tensors: dict[str, dict[str, Tensor]]
    passed_over: tuple[str, ...] = ()


NO_CHECKPOINT = Checkpoint(Path(), {}, {})
"""The checkpoint of a new run, and of all ranks but the first."""


class Damage(Exception):
    """A damaged checkpoint. The message names the file and the damage; callers add the way out."""


def json_bytes(value: Json) -> bytes:
    """Encode a JSON object, always in the same way.

    Raises:
        ValueError: A number is not finite.
    """
    return json.dumps(value, allow_nan=False, indent=1).encode()


def write_files(folder: Path, state: bytes, tensors: Tensors) -> None:
    """Write and fsync every file of a checkpoint into a new folder.

    Args:
        state: `json_bytes` of the state.
        tensors: On any device and of any type. Saved bit for bit.
    """
    folder.mkdir()
    files = {_STATE: _write_file(folder / _STATE, [state])}
    for stem, named in tensors.items():
        name = stem + _TENSORS
        assert _FILE_NAME.fullmatch(name), f"{stem!r} would be refused by a reader"
        files[name] = _write_file(folder / name, _safetensors(named))
    _write_file(folder / MANIFEST, [json_bytes({"format": _FORMAT, "files": files})])


def _write_file(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, object]:
    """Write and fsync a file; return its entry in the manifest, computed from the content in memory."""
    size, digest = 0, hashlib.sha256()
    with open(path, "xb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _safetensors(named: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the content of a safetensors file: the header, then each tensor, uncopied if it is contiguous on the CPU.

    The library would copy the whole file while all other threads, the steps among them, wait for the interpreter.
    """
    empty = safetensors.torch.save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in named.items()})
    header, end = json.loads(empty[8:]), 0
    for name, entry in header.items():
        entry["shape"], start, end = [*named[name].shape], end, end + named[name].nbytes
        entry["data_offsets"] = [start, end]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in header:
        yield named[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def read_files(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint. Files that the manifest does not name are never opened.

    Raises:
        Damage: Something is not as it was written.
    """
    files = _read_manifest(folder)
    if _STATE not in files:
        _refuse(folder, MANIFEST, f"names no {_STATE}")
    state = _parse_json(folder, _STATE, _verified(folder, _STATE, files.pop(_STATE)))
    parsed = {name: _parse_tensors(folder, name, _verified(folder, name, entry)) for name, entry in files.items()}
    return Checkpoint(folder, state, {name.removesuffix(_TENSORS): named for name, named in parsed.items()})


def _read_manifest(folder: Path) -> dict[str, dict[str, object]]:
    """Read size and digest by file name. Every name is a plain file name in this folder."""
    content = _content(folder, MANIFEST)
    manifest = _parse_json(folder, MANIFEST, content)
    if manifest.get("format") != _FORMAT:
        _refuse(folder, MANIFEST, f"has format {manifest.get('format')!r}, but this version reads format {_FORMAT}")
    files = manifest.get("files")
    # No digest covers the manifest, so accept only the exact bytes that a write would make of its content.
    if not _are_entries(files) or json_bytes({"format": _FORMAT, "files": files}) != content:
        _refuse(folder, MANIFEST, "is not as it was written")
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            _refuse(folder, MANIFEST, f"names {name!r}, which is not a checkpoint file")
    return files


def _are_entries(files: object) -> TypeGuard[dict[str, dict[str, object]]]:
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == {"size": int, "sha256": str}
        for entry in files.values()
    )


def _verified(folder: Path, name: str, entry: dict[str, object]) -> bytes:
    """Read a file, and check that its bytes are those that were written."""
    content = _content(folder, name)
    if len(content) != entry["size"]:
        _refuse(folder, name, f"has {len(content)} bytes, but {entry['size']} were written")
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        _refuse(folder, name, "has changed since it was written (its SHA-256 differs)")
    return content


def _content(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if not path.is_file():  # reading a pipe would never end
            _refuse(folder, name, "is not a file" if path.exists() else "is missing")
        return path.read_bytes()
    except OSError as error:
        _refuse(folder, name, f"cannot be read ({error.strerror})")


def _parse_json(folder: Path, name: str, content: bytes) -> Json:
    try:
        value = json.loads(content.decode(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        _refuse(folder, name, f"is not JSON ({error})")
    if not isinstance(value, dict):
        _refuse(folder, name, "is not a JSON object")
    return value


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word} is not a finite number")
    return value


def _parse_tensors(folder: Path, name: str, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        _refuse(folder, name, f"is not a safetensors file ({error})")


def _refuse(folder: Path, name: str, what: str) -> NoReturn:
    raise Damage(f"checkpoint {folder}: {name} {what}")
