"""Data that one process of each host reads, and all of them map into memory."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from colm_scale.config.cache import cache_folder
from colm_scale.data.reading import Reading, find_or_read
from colm_scale.data.tokenised import Damaged, Tokenised, open_file
from colm_scale.distributed.group import Group


def once_per_host(reading: Reading, group: Group) -> Tokenised:
    """Return the same tokenised data on every rank; all call it together.

    On each host the first rank finds it in the cache or reads it, with all the cores that it may use, while the others
    sleep; they then map its file. What the cache cannot hold is in a temporary folder until all have mapped it. A rank
    that does not see the file, such as one in a container of its own, finds or reads the data itself.

    Raises:
        UserError: On the rank that detects it, see `Reading.tokenised` and `Group.together`; or, on rank 0, the
            data of two ranks differ.
    """
    temporary = _temporary_folders() if group.local_world_size > 1 else []
    reads = group.local_rank == 0
    try:
        with group.together():
            try:
                found = find_or_read(reading, temporary, _warn) if reads else None
            finally:
                group.rest()
        files = group.texts(found.file if found else "")
        with group.together():
            found = found or _mapped(files) or find_or_read(reading, [], _warn)
    finally:
        for folder in temporary:
            shutil.rmtree(folder, ignore_errors=True)
    group.agree(found.digest, {"train": "training data", "eval": "held-out data"}[reading.split])
    return found


def _mapped(files: Sequence[str]) -> Tokenised | None:
    """Map the first of some ranks' files that this rank sees; files of other hosts have the same content.

    Temporary ones come first: where one is, the cache could not be written, and may be damaged.
    """
    for file in sorted({*files} - {""}, key=lambda file: cache_folder() in Path(file).parents):
        try:
            return open_file(Path(file), verify=False)
        except (FileNotFoundError, Damaged):
            continue
    return None


def _temporary_folders() -> list[Path]:
    """Name new folders, in memory and on disk; they are made when they are needed."""
    name = f"colm_scale-{uuid4().hex}"
    return [Path(place, name) for place in ("/dev/shm", tempfile.gettempdir())]


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
