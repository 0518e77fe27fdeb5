"""The checkpoints of a run as folders, written whole or not at all: ``checkpoints/step-00000020/`` holds `files`.

A folder is written under a dot-name and then renamed. A killed run may leave any of these dot-names, and the next write
clears them up:

    .step-00000020.new   being written; never read
    .step-00000020.old   whole, being replaced by another of the same step; valid until that one has its final name
    .step-00000020.gone  being deleted; never read

What a file system will not remove (one of NFS keeps files that are open anywhere) stays under its dot-name; another of
that name then gets a number: ``.step-00000020.new2``.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from colm_scale.checkpoint.files import MANIFEST, Checkpoint, Damage, Tensors, json_bytes, read_files, write_files
from colm_scale.errors import TrainingError, UserError
from colm_scale.records import Json
from colm_scale.reporting.run_directory import free_name

_FINAL = re.compile(r"step-(\d{8,})")
_ASIDE = re.compile(r"\.(step-(\d{8,}))\.(new|old|gone)\d*")
_REFUSALS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES}
"""Errors of network file systems that cannot fsync a folder."""


class CheckpointFolder:
    """The checkpoints of one run. One process writes.

    Args:
        path: ``OUTPUT_DIR/checkpoints``; the first write makes it.
        keep: Number of checkpoints to retain, at least 1. A write needs disk space for one more.

    Attributes:
        notes: What the file system refused without harm to the newest checkpoint; each kind once.
    """

    def __init__(self, path: Path, keep: int):
        self._path, self._keep = path, keep
        self.notes: list[str] = []
        self._noted: set[str] = set()
        self._stuck: dict[Path, str] = {}

    def write(self, step: int, state: Json, tensors: Tensors) -> Path:
        """Write the checkpoint of a step, and remove those beyond ``keep``.

        If the process is killed at any moment, `newest` finds a whole checkpoint: the previous one or this one. A
        checkpoint of the same step is replaced. Those of later steps are removed, because the run has gone back to
        before them and `newest` must find what it wrote last.

        Args:
            state: Plain JSON without NaN; tuples come back as lists.
            tensors: By file stem (letters, digits, ``_`` and ``-``) and name, on any device and of any type. Saved bit
                for bit; copied one at a time, unless they are contiguous on the CPU.

        Raises:
            TrainingError: The checkpoint cannot be written, for example on a full disk; nothing of it is left and
                earlier ones are intact. Or one of a later step cannot be removed. An old one that cannot is noted, and
                the next write tries again.
        """
        final = self._path / f"step-{step:08d}"
        text = json_bytes(state)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._sync(self._path.parent)
            self._tidy()
            new = _aside(final, "new")
            write_files(new, text, tensors)
            self._sync(new)
            self._put(new, final)
        except OSError as error:
            self._take_back(final)
            needed = len(text) + sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
            raise TrainingError(
                f"checkpoint {final} cannot be written: {error.strerror}; it needs {needed:,} bytes, and "
                f"{_free_bytes(self._path):,} are free. Earlier checkpoints are untouched"
            ) from error
        self._prune(step)
        if self._stuck:
            number, why = len(self._stuck), next(iter(self._stuck.values()))
            old = "1 old checkpoint" if number == 1 else f"{number} old checkpoints"
            self._note("removal", f"{old} in {self._path} cannot be removed ({why}); every write tries again")
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
                return dataclasses.replace(read_files(folder), passed_over=tuple(passed_over))
            except Damage as damage:
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
        elif not (path / MANIFEST).exists() and not (_FINAL.fullmatch(path.name) or _ASIDE.fullmatch(path.name)):
            raise UserError(
                f"--resume {path} is neither a checkpoint (it has no {MANIFEST}) nor a run directory (it has no "
                f"{inner.name})"
            )
        try:
            return read_files(folder)
        except Damage as damage:
            raise UserError(f"{damage}; use another checkpoint for --resume") from None

    def _put(self, new: Path, final: Path) -> None:
        """Give the new checkpoint its final name; until then one of the same name stays valid."""
        old = _aside(final, "old")
        if final.exists():
            os.rename(final, old)
        os.rename(new, final)
        self._sync(self._path)
        if old.exists():
            self._discard(old)

    def _take_back(self, final: Path) -> None:
        """Clean up after a failed write, and undo half a replacement."""
        for new in self._path.glob(f".{final.name}.new*"):
            shutil.rmtree(new, ignore_errors=True)
        for old in sorted(self._path.glob(f".{final.name}.old*"), reverse=True):
            if not final.exists():
                with suppress(OSError):  # it stays under a name that is read too
                    os.rename(old, final)

    def _tidy(self) -> None:
        """Clear up after a killed run. A checkpoint whose replacement never came gets its name back."""
        self._stuck = {}
        for folder in sorted(self._path.iterdir(), reverse=True):
            if match := _ASIDE.fullmatch(folder.name):
                if match[3] != "old":
                    self._remove(folder)
                elif (self._path / match[1]).exists():
                    self._discard(folder)
                else:
                    os.rename(folder, self._path / match[1])

    def _prune(self, step: int) -> None:
        """Retain the newest checkpoints up to ``step``."""
        found = _whole_ones(self._path)
        retained = [folder for number, folder in found if number <= step][-self._keep :]
        for number, folder in found:
            if folder not in retained:
                self._discard(folder)
                if number > step and folder.exists():
                    raise TrainingError(
                        f"checkpoint {folder} cannot be removed: {self._stuck[folder]}. The run has gone back to step "
                        f"{step} and would resume from there: remove it"
                    )

    def _discard(self, folder: Path) -> None:
        """Delete a checkpoint, first renaming it so that it is not read when half deleted."""
        gone = _aside(folder, "gone")
        try:
            os.rename(folder, gone)
        except OSError as error:
            self._stuck[folder] = error.strerror or str(error)
        else:
            self._remove(gone)

    def _remove(self, folder: Path) -> None:
        """Delete a folder that is never read, as far as the file system lets it go."""
        try:
            shutil.rmtree(folder)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._stuck[folder] = error.strerror or str(error)

    def _sync(self, folder: Path) -> None:
        """Fsync a folder, so that the names in it persist, if the file system can do that."""
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            lost = "the newest checkpoint may be missing after a power failure"
            self._note("sync", f"the file system of {self._path} cannot fsync folders ({error.strerror}): {lost}")

    def _note(self, kind: str, text: str) -> None:
        if kind not in self._noted:
            self._noted.add(kind)
            self.notes.append(text)


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
    """Return the first free dot-name of a ``kind`` for a checkpoint that has any of its names."""
    return free_name(folder.with_name(f".{folder.name.strip('.').split('.')[0]}.{kind}"))


def _free_bytes(path: Path) -> int:
    nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(nearest).free
