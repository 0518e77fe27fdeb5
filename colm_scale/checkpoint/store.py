"""Checkpoints as folders: written whole or not at all, verified before a byte of them is used, free of code.

    checkpoints/step-00000020/
        state.json                plain JSON
        adapter.safetensors, ...  tensors by name, one file per stem
        manifest.json             format, and size and SHA-256 of every other file; written last

A folder is written under a dot-name and renamed. These are the names beside the final ones; a run that is killed may
leave any of them, and the next write clears them up:

    .step-00000020.new   being written; never read
    .step-00000020.old   whole: it gave way to another of the same step. It counts until that one has its final name
    .step-00000020.gone  being deleted; never read

Nothing is unpickled: JSON and safetensors hold data only.
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
    """What was read from a checkpoint's folder, every byte of it verified.

    Attributes:
        path: The folder.
        state: Of ``state.json``.
        tensors: By file stem ("adapter", "optimizer", ...) and name, on the CPU.
        passed_over: What is wrong with each newer checkpoint that was damaged, where that was to be put up with.
    """

    path: Path
    state: Json
    tensors: dict[str, dict[str, Tensor]]
    passed_over: tuple[str, ...] = ()


class CheckpointFolder:
    """The checkpoints of one run. One process writes.

    Args:
        path: ``OUTPUT_DIR/checkpoints``; made by the first write.
        keep: How many are kept, at least 1. While one is written there is room needed for one more.
    """

    def __init__(self, path: Path, keep: int):
        self._path, self._keep = path, keep

    def write(self, step: int, state: Json, tensors: dict[str, dict[str, Tensor]]) -> Path:
        """Write the checkpoint of a step, and remove those beyond ``keep``.

        Whatever the moment at which this is killed, `newest` finds a whole checkpoint: the one before or this one. One
        of the same step is replaced. Those of later steps are removed as well: a run that writes this step has gone
        back to before them, and `newest` must find what it wrote last.

        Args:
            state: Plain JSON: no NaN, and what is a tuple comes back as a list.
            tensors: By file stem (letters, digits, ``_`` and ``-``) and name, anywhere and of any type. Saved bit by
                bit; one file at a time is copied in memory.

        Raises:
            TrainingError: The disk is full or will not take it: then no half of it is left, and the earlier ones are
                as they were. Or one of those to be removed cannot be.
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
        """The newest checkpoint; None without any.

        Args:
            fallback: If the newest is damaged, take the newest one that is not, and say so in ``passed_over``.

        Raises:
            UserError: It is damaged, or with ``fallback`` all of them are. Names the file and what is wrong.
        """
        passed_over: list[str] = []
        for _, folder in reversed(_whole_ones(self._path)):
            try:
                return dataclasses.replace(_read(folder), passed_over=tuple(passed_over))
            except _Damage as damage:
                if not fallback:
                    raise UserError(
                        f"{damage}; --checkpoint.fallback true goes on from the newest that is whole, --resume FOLDER "
                        "from another; or remove this one"
                    ) from None
                passed_over.append(str(damage))
        if passed_over:
            raise UserError(
                f"{self._path}: none of the {len(passed_over)} checkpoints is whole ({'; '.join(passed_over)}); remove "
                "them or give another --output_dir to begin anew"
            )
        return None

    @staticmethod
    def read(path: Path) -> Checkpoint:
        """The checkpoint ``path``, or the newest of the run whose folder ``path`` is.

        Raises:
            UserError: There is none, or it is damaged. Names the file and what is wrong.
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
                f"--resume {path} is neither a checkpoint (it has no {_MANIFEST}) nor the folder of a run (it has no "
                f"{inner.name})"
            )
        try:
            return _read(folder)
        except _Damage as damage:
            raise UserError(f"{damage}; give another checkpoint with --resume") from None

    def _put(self, final: Path) -> None:
        """Give the new checkpoint its final name; in between, what had that name before still counts."""
        old = _aside(final, "old")
        if final.exists():
            os.rename(final, old)
        os.rename(_aside(final, "new"), final)
        _sync(self._path)
        if old.exists():
            _discard(old)

    def _take_back(self, final: Path) -> None:
        """After a failed write: free its space, and undo half a replacement."""
        shutil.rmtree(_aside(final, "new"), ignore_errors=True)
        if not final.exists():
            with suppress(OSError):  # there is none to put back, or it stays where it is found all the same
                os.rename(_aside(final, "old"), final)

    def _tidy(self) -> None:
        """Clear up what a killed run left. A replaced checkpoint whose successor never came gets its name back."""
        for folder in sorted(self._path.iterdir()):
            match = _ASIDE.fullmatch(folder.name)
            if match is None:
                continue
            if match[3] != "old":
                shutil.rmtree(folder)
            elif (self._path / match[1]).exists():
                _discard(folder)
            else:
                os.rename(folder, self._path / match[1])

    def _prune(self, step: int) -> None:
        """Keep the newest up to ``step``."""
        found = _whole_ones(self._path)
        kept = [folder for number, folder in found if number <= step][-self._keep :]
        for _, folder in found:
            if folder not in kept:
                _discard(folder)


class _Damage(Exception):
    """A checkpoint cannot be used. The message names it, the file and what is wrong, not yet the way out."""


def _whole_ones(path: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint that was written to its end, oldest first. Not verified."""
    try:
        # A dot sorts before a letter: a final name takes the place of the one it replaced.
        folders = sorted(path.iterdir()) if path.is_dir() else []
    except OSError as error:
        raise UserError(f"{path} cannot be looked into for checkpoints: {error.strerror}") from None
    found: dict[int, Path] = {}
    for folder in folders:
        if match := _FINAL.fullmatch(folder.name):
            found[int(match[1])] = folder
        elif (match := _ASIDE.fullmatch(folder.name)) and match[3] == "old":
            found[int(match[2])] = folder
    return sorted(found.items())


def _aside(folder: Path, kind: str) -> Path:
    """The dot-name of that kind of a checkpoint, whatever name it has now."""
    final = _FINAL.search(folder.name)
    assert final is not None
    return folder.with_name(f".{final[0]}.{kind}")


def _discard(folder: Path) -> None:
    """Delete a checkpoint. Half deleted it has a name that nobody reads.

    Raises:
        TrainingError: It cannot be deleted.
    """
    gone = _aside(folder, "gone")
    try:
        os.rename(folder, gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise TrainingError(
            f"checkpoint {folder}, which is no longer needed, cannot be removed: {error.strerror}"
        ) from error


def _write_files(folder: Path, state: bytes, tensors: dict[str, dict[str, Tensor]]) -> None:
    """A new folder with every file of a checkpoint, on the disk when this returns."""
    folder.mkdir()
    files = {_STATE: _write_file(folder / _STATE, state)}
    for stem, named in tensors.items():
        name = stem + _TENSORS
        assert _FILE_NAME.fullmatch(name), f"{stem!r} would be refused by a reader"
        files[name] = _write_file(folder / name, _tensor_bytes(named))
    _write_file(folder / _MANIFEST, _json_bytes({"format": _FORMAT, "files": files}))
    _sync(folder)


def _write_file(path: Path, content: bytes) -> dict[str, object]:
    """Write and fsync; returns the file's entry in the manifest, made from what was meant to be written."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return _facts(content)


def _facts(content: bytes) -> dict[str, object]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _tensor_bytes(named: dict[str, Tensor]) -> bytes:
    # Copied, for safetensors refuses tensors that share memory, and those with gaps.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in named.items()
    }
    return safetensors.torch.save(copies)


def _json_bytes(value: Json) -> bytes:
    return json.dumps(value, allow_nan=False, indent=1).encode()


def _sync(folder: Path) -> None:
    """Make the names within a folder last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int:
    nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(nearest).free


def _read(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify all of it. A file that the manifest does not name is never opened.

    Raises:
        _Damage: Anything about it is not as it was written.
    """
    files = _read_manifest(folder)
    if _STATE not in files:
        _refuse(folder, _MANIFEST, f"names no {_STATE}")
    state = _parse_json(folder, _STATE, _verified(folder, _STATE, files.pop(_STATE)))
    tensors = {}
    for name, facts in files.items():
        tensors[name.removesuffix(_TENSORS)] = _parse_tensors(folder, name, _verified(folder, name, facts))
    return Checkpoint(folder, state, tensors)


def _read_manifest(folder: Path) -> dict[str, dict[str, object]]:
    """Size and digest by file name; every name is one of a file in this folder."""
    content = _content(folder, _MANIFEST)
    manifest = _parse_json(folder, _MANIFEST, content)
    if manifest.get("format") != _FORMAT:
        _refuse(folder, _MANIFEST, f"has format {manifest.get('format')!r}, but this version reads format {_FORMAT}")
    files = manifest.get("files")
    # No digest covers the manifest: only the very bytes that a write would make of what it says are taken.
    if not _are_entries(files) or _json_bytes({"format": _FORMAT, "files": files}) != content:
        _refuse(folder, _MANIFEST, "is not as it was written")
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            _refuse(folder, _MANIFEST, f"names {name!r}, which is no file of a checkpoint")
    return files


def _are_entries(files: object) -> TypeGuard[dict[str, dict[str, object]]]:
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == {"size": int, "sha256": str}
        for entry in files.values()
    )


def _verified(folder: Path, name: str, facts: dict[str, object]) -> bytes:
    """A file's bytes, which are those that were written."""
    content = _content(folder, name)
    if len(content) != facts["size"]:
        _refuse(folder, name, f"has {len(content)} bytes, but {facts['size']} were written")
    if _facts(content) != facts:
        _refuse(folder, name, "has changed since it was written (its SHA-256 is another)")
    return content


def _content(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if not path.is_file():  # a pipe would never end
            _refuse(folder, name, "is no file" if path.exists() else "is missing")
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
        _refuse(folder, name, f"is no safetensors file ({error})")


def _refuse(folder: Path, name: str, what: str) -> NoReturn:
    raise _Damage(f"checkpoint {folder}: {name} {what}")
