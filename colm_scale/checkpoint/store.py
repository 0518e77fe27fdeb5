"""Checkpoints as folders: written whole or not at all, verified before use, and without code.

    checkpoints/step-00000020/
        state.json                plain JSON
        adapter.safetensors, ...  tensors by name, one file per stem
        manifest.json             format, and size and SHA-256 of every other file; written last

A folder is written under a dot-name and then renamed. A killed run may leave any of these dot-names, and the next write
clears them up:

    .step-00000020.new   being written; never read
    .step-00000020.old   whole, being replaced by another of the same step; valid until that one has its final name
    .step-00000020.gone  being deleted; never read

Nothing is unpickled: JSON and safetensors hold only data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from colm_scale.errors import TrainingError, UserError
from colm_scale.records import Json

_FORMAT = 1
_STATE, _MANIFEST, _TENSORS = "state.json", "manifest.json", ".safetensors"
_FINAL = re.compile(r"step-(\d{8,})")
_ASIDE = re.compile(r"\.(step-(\d{8,}))\.(new|old|gone)")
_FILE_NAME = re.compile(r"\w[\w-]*\.safetensors|state\.json", re.ASCII)


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


class NoCheckpointFolder:
    """The folder of all ranks but the first: writes nothing."""

    def write(self, step: int, state: Json, tensors: dict[str, dict[str, Tensor]]) -> None: ...


class CheckpointFolder:
    """The checkpoints of one run. One process writes.

    Args:
        path: ``OUTPUT_DIR/checkpoints``; the first write makes it.
        keep: Number of checkpoints to retain, at least 1. A write needs disk space for one more.
    """

    def __init__(self, path: Path, keep: int):
        self._path, self._keep = path, keep

    def write(self, step: int, state: Json, tensors: dict[str, dict[str, Tensor]]) -> Path:
        """Write the checkpoint of a step, and remove those beyond ``keep``.

        If the process is killed at any moment, `newest` finds a whole checkpoint: the previous one or this one. A
        checkpoint of the same step is replaced. Those of later steps are removed, because the run has gone back to
        before them and `newest` must find what it wrote last.

        Args:
            state: Plain JSON without NaN; tuples come back as lists.
            tensors: By file stem (letters, digits, ``_`` and ``-``) and name, on any device and of any type. Saved bit
                for bit; one file at a time is copied in memory.

        Raises:
            TrainingError: The checkpoint cannot be written, for example on a full disk; nothing of it is left and
                earlier ones are intact. Or an old one cannot be removed.
        """
        final = self._path / f"step-{step:08d}"
        text = _json_bytes(state)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            _sync(self._path.parent)
            self._tidy()
            _write_files(_aside(final, "new"), text, tensors)
            self._put(final)
        except OSError as error:
            self._take_back(final)
            needed = len(text) + sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
            raise TrainingError(
                f"checkpoint {final} cannot be written: {error.strerror}; it needs {needed:,} bytes, and "
                f"{_free_bytes(self._path):,} are free. Earlier checkpoints are untouched"
            ) from error
        self._prune(step)
        return final

    def newest(self, fallback: bool) -> Checkpoint | None:
        """Read the newest checkpoint; None if there is none.

        Args:
            fallback: Skip damaged checkpoints, and list them in ``passed_over``.

        Raises:
            UserError: It is damaged, or with ``fallback`` all of them are. Names the file and the damage.
        """
        passed_over: list[str] = []
        for _, folder in reversed(_whole_ones(self._path)):
            try:
                return dataclasses.replace(_read(folder), passed_over=tuple(passed_over))
            except _Damage as damage:
                if not fallback:
                    raise UserError(
                        f"{damage}; use --checkpoint.fallback true to resume from the newest intact one, --resume "
                        "FOLDER for another, or remove this one"
                    ) from None
                passed_over.append(str(damage))
        if passed_over:
            raise UserError(
                f"{self._path}: all {len(passed_over)} checkpoints are damaged ({'; '.join(passed_over)}); remove them "
                "or use another --output_dir to start again"
            )
        return None

    @staticmethod
    def read(path: Path) -> Checkpoint:
        """Read the checkpoint ``path``, or the newest one of the run directory ``path``.

        Raises:
            UserError: There is none, or it is damaged. Names the file and the damage.
        """
        folder, inner = path, path / "checkpoints"
        if not path.is_dir():
            raise UserError(f"--resume {path}: there is no such folder")
        if inner.is_dir():
            whole = _whole_ones(inner)
            if not whole:
                raise UserError(f"--resume {path}: this run has written no checkpoint ({inner} holds none)")
            folder = whole[-1][1]
        elif not (path / _MANIFEST).exists() and not (_FINAL.fullmatch(path.name) or _ASIDE.fullmatch(path.name)):
            raise UserError(
                f"--resume {path} is neither a checkpoint (it has no {_MANIFEST}) nor a run directory (it has no "
                f"{inner.name})"
            )
        try:
            return _read(folder)
        except _Damage as damage:
            raise UserError(f"{damage}; use another checkpoint for --resume") from None

    def _put(self, final: Path) -> None:
        """Give the new checkpoint its final name; until then one of the same name stays valid."""
        old = _aside(final, "old")
        if final.exists():
            os.rename(final, old)
        os.rename(_aside(final, "new"), final)
        _sync(self._path)
        if old.exists():
            _discard(old)

    def _take_back(self, final: Path) -> None:
        """Clean up after a failed write, and undo half a replacement."""
        shutil.rmtree(_aside(final, "new"), ignore_errors=True)
        if not final.exists():
            with suppress(OSError):  # there is none, or it stays under a name that is read too
                os.rename(_aside(final, "old"), final)

    def _tidy(self) -> None:
        """Clear up after a killed run. A checkpoint whose replacement never came gets its name back."""
        for folder in sorted(self._path.iterdir()):
            if match := _ASIDE.fullmatch(folder.name):
                if match[3] != "old":
                    shutil.rmtree(folder)
                elif (self._path / match[1]).exists():
                    _discard(folder)
                else:
                    os.rename(folder, self._path / match[1])

    def _prune(self, step: int) -> None:
        """Retain the newest checkpoints up to ``step``."""
        found = _whole_ones(self._path)
        retained = [folder for number, folder in found if number <= step][-self._keep :]
        for _, folder in found:
            if folder not in retained:
                _discard(folder)


class _Damage(Exception):
    """A damaged checkpoint. The message names the file and the damage; callers add the way out."""


def _whole_ones(path: Path) -> list[tuple[int, Path]]:
    """List step and folder of each completely written checkpoint, oldest first. Not verified."""
    try:
        # A dot sorts before a letter, so a final name overrides the one it replaced.
        folders = sorted(path.iterdir()) if path.is_dir() else []
    except OSError as error:
        raise UserError(f"{path} cannot be searched for checkpoints: {error.strerror}") from None
    found: dict[int, Path] = {}
    for folder in folders:
        if match := _FINAL.fullmatch(folder.name):
            found[int(match[1])] = folder
        elif (match := _ASIDE.fullmatch(folder.name)) and match[3] == "old":
            found[int(match[2])] = folder
    return sorted(found.items())


def _aside(folder: Path, kind: str) -> Path:
    """Return the dot-name of a ``kind`` for a checkpoint that has any of its names."""
    return folder.with_name(f".{folder.name.strip('.').split('.')[0]}.{kind}")


def _discard(folder: Path) -> None:
    """Delete a checkpoint, first renaming it so that it is not read when half deleted.

    Raises:
        TrainingError: It cannot be deleted.
    """
    gone = _aside(folder, "gone")
    try:
        os.rename(folder, gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise TrainingError(
            f"checkpoint {folder} is no longer needed, but cannot be removed: {error.strerror}"
        ) from error


def _write_files(folder: Path, state: bytes, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write every file of a checkpoint into a new folder, and fsync."""
    folder.mkdir()
    files = {_STATE: _write_file(folder / _STATE, state)}
    for stem, named in tensors.items():
        name = stem + _TENSORS
        assert _FILE_NAME.fullmatch(name), f"{stem!r} would be refused by a reader"
        files[name] = _write_file(folder / name, _tensor_bytes(named))
    _write_file(folder / _MANIFEST, _json_bytes({"format": _FORMAT, "files": files}))
    _sync(folder)


def _write_file(path: Path, content: bytes) -> dict[str, object]:
    """Write and fsync a file; return its entry in the manifest, computed from ``content``."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return _entry(content)


def _entry(content: bytes) -> dict[str, object]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _tensor_bytes(named: dict[str, Tensor]) -> bytes:
    # Copied, because safetensors refuses tensors with gaps or shared memory.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in named.items()
    }
    return safetensors.torch.save(copies)


def _json_bytes(value: Json) -> bytes:
    return json.dumps(value, allow_nan=False, indent=1).encode()


def _sync(folder: Path) -> None:
    """Fsync a folder, so that the names in it persist."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int:
    nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(nearest).free


def _read(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint. Files that the manifest does not name are never opened.

    Raises:
        _Damage: Something is not as it was written.
    """
    files = _read_manifest(folder)
    if _STATE not in files:
        _refuse(folder, _MANIFEST, f"names no {_STATE}")
    state = _parse_json(folder, _STATE, _verified(folder, _STATE, files.pop(_STATE)))
    parsed = {name: _parse_tensors(folder, name, _verified(folder, name, entry)) for name, entry in files.items()}
    return Checkpoint(folder, state, {name.removesuffix(_TENSORS): named for name, named in parsed.items()})


def _read_manifest(folder: Path) -> dict[str, dict[str, object]]:
    """Read size and digest by file name. Every name is a plain file name in this folder."""
    content = _content(folder, _MANIFEST)
    manifest = _parse_json(folder, _MANIFEST, content)
    if manifest.get("format") != _FORMAT:
        _refuse(folder, _MANIFEST, f"has format {manifest.get('format')!r}, but this version reads format {_FORMAT}")
    files = manifest.get("files")
    # No digest covers the manifest, so accept only the exact bytes that a write would make of its content.
    if not _are_entries(files) or _json_bytes({"format": _FORMAT, "files": files}) != content:
        _refuse(folder, _MANIFEST, "is not as it was written")
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            _refuse(folder, _MANIFEST, f"names {name!r}, which is not a checkpoint file")
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
    if _entry(content) != entry:
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
    raise _Damage(f"checkpoint {folder}: {name} {what}")
