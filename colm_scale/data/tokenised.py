"""Files of tokenised examples, which several processes map into memory, and the folder that caches them.

A file is a safetensors file with the tensors of `Examples`; its metadata hold everything else as JSON. It is written
under another name first, so a name always stands for a whole file, whoever else writes it at the same time. Nothing is
flushed to the disk: what a crash of the machine damages is detected by the digest of all contents, and read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from colm_scale.data.examples import Examples
from colm_scale.data.formats import said

_WHOLE, _PART = re.compile(r"[0-9a-f]{64}\.safetensors"), re.compile(r"\.[0-9a-f]{64}-[0-9a-f]{32}|\.tmp\w{6}")
"""Names of files, and of files being written, by us and by safetensors; nothing else in a folder is ever removed."""
_TENSORS = ("tokens", "labelled", "offsets", "ids", "sources", "protected")
_MOST_BYTES = 20 * 2**30
_SPARED_SECONDS = 7 * 24 * 3600.0
"""Files used this recently are never removed: on a network file system that would end a run on another host."""
_ABANDONED_SECONDS = 24 * 3600.0
"""Half-written files this old are of processes that were killed."""


class NotStored(Exception):
    """A folder cannot be written."""


class Damaged(Exception):
    """A file is not what was written."""


@dataclass(frozen=True, slots=True)
class Tokenised:
    """Tokenised data with its digests.

    Attributes:
        digest: `Examples.digest` of the examples.
        rows_digest: `RowDigest` of the rows.
        file: The file they are mapped from; empty if they are only in this process's memory.
        lasting: False if the same rows could have other tokens tomorrow.
    """

    examples: Examples
    digest: str
    rows_digest: str
    file: str = ""
    lasting: bool = True


def write(tokenised: Tokenised, path: Path) -> None:
    """Write a file.

    Raises:
        OSError, SafetensorError: It cannot be written.
    """
    examples = tokenised.examples
    facts = json.dumps(
        {
            "source_names": examples.source_names,
            "dropped": examples.dropped,
            "cut": examples.cut,
            "digest": tokenised.digest,
            "rows_digest": tokenised.rows_digest,
        }
    )
    tensors = {name: getattr(examples, name) for name in _TENSORS}
    save_file(tensors, path, metadata={"facts": facts, "check": _sha256(facts)})


def open_file(path: Path, *, verify: bool) -> Tokenised:
    """Map a file into memory; its pages are shared with other processes.

    Args:
        verify: Read the whole file, and compare it with its digest.

    Raises:
        FileNotFoundError: There is none.
        Damaged: It is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        if _sha256(metadata["facts"]) != metadata["check"]:
            raise ValueError("its header has changed")
        facts = json.loads(metadata["facts"])
        digest, rows_digest = facts.pop("digest"), facts.pop("rows_digest")
        examples = Examples(**tensors, **facts | {"source_names": tuple(facts["source_names"])})
        if verify and examples.digest() != digest:
            raise ValueError("its contents have changed")
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is damaged ({said(error)})") from error
    return Tokenised(examples, digest, rows_digest, str(path))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class TokenFolder:
    """A folder of tokenised data, a file for each key of 64 hexadecimal digits.

    It is readable by its owner only. If it grows above 20 GiB, the files that were not used for longest are removed,
    but none that was used in the last week.
    """

    def __init__(self, path: Path):
        self.path = path

    def find(self, key: str) -> Tokenised | None:
        """Return what is stored under a key, verified.

        Raises:
            Damaged: It is not what was written.
        """
        path = self._file(key)
        try:
            found = open_file(path, verify=True)
        except FileNotFoundError:
            return None
        with suppress(OSError):  # a cache may be readable only
            os.utime(path)
        return found

    def store(self, key: str, tokenised: Tokenised) -> Tokenised:
        """Store data under a key, and return it mapped from the file.

        Raises:
            NotStored: The folder cannot be written, or its disk is full.
        """
        part, path = self.path / f".{key}-{uuid4().hex}", self._file(key)
        try:
            self.path.mkdir(0o700, parents=True, exist_ok=True)
            try:
                write(tokenised, part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            stored = open_file(path, verify=False)
        except (OSError, SafetensorError, Damaged) as error:
            raise NotStored(f"{self.path} cannot hold the tokenised data ({said(error)})") from error
        self._prune()
        return stored

    def _file(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"

    def _prune(self) -> None:
        """Remove abandoned parts, and above the limit what was not used for longest."""
        now, size = time.time(), 0
        with suppress(OSError):  # another run prunes as well
            found = [(path, path.stat()) for path in self.path.iterdir()]
            for path, facts in sorted(found, key=lambda one: one[1].st_mtime, reverse=True):
                age, whole = now - facts.st_mtime, _WHOLE.fullmatch(path.name)
                size += facts.st_size if whole else 0
                unused = whole and size > _MOST_BYTES and age > _SPARED_SECONDS
                if unused or (_PART.fullmatch(path.name) and age > _ABANDONED_SECONDS):
                    path.unlink()
