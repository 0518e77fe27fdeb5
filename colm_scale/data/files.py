"""From what the user names to files: globs, folders and hub data sets, and the sources that their names give."""

from __future__ import annotations

import difflib
import glob
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from colm_scale.data.hub import HubSet, parsed, resolved
from colm_scale.errors import UserError

FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".xlsx")
COMPRESSED = (".gz", ".zst")
_TEXT_FORMATS = (".jsonl", ".json", ".csv")
"""Formats that may be compressed."""
_OTHER_SUFFIXES = (
    ".txt",
    ".tsv",
    ".arrow",
    ".feather",
    ".xls",
    ".ndjson",
    ".xml",
    ".yaml",
    ".md",
    ".zip",
    ".tar",
    ".xz",
)
"""Suffixes of files that are not read; no hub data set is looked for."""
_KNOWN = f"{', '.join(FORMATS)}; {', '.join(_TEXT_FORMATS)} also with {' or '.join(COMPRESSED)} after it"


def format_of(path: PurePath) -> str:
    """Return the suffix that tells a file's format, without that of its compression; empty if it has none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] and suffixes[-1] in COMPRESSED:
        return suffixes[0] if len(suffixes) > 1 and suffixes[0] in _TEXT_FORMATS else ""
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else ""


def hub_set(spec: str) -> HubSet | None:
    """Return the hub data set of a name; None if ``spec`` names a file."""
    path = Path(spec)
    if format_of(path) or path.exists() or path.suffix in (*COMPRESSED, *_OTHER_SUFFIXES):
        return None
    return parsed(spec)


def files_of(spec: str) -> list[str]:
    """List the files of a file's name, folder or pattern, sorted; of a hub data set, its name with the configuration.

    Raises:
        UserError: There is no such file, or none of a known format; or a hub data set has other configurations.
    """
    path = Path(spec)
    if hub_set(spec):
        return [resolved(spec)]
    if spec and path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if file.is_file() and format_of(file))
        if not found:
            raise UserError(f"{path} is a folder without any file of a known format ({_KNOWN})")
        return found
    if glob.has_magic(spec) and not path.exists():
        found = sorted(file for file in glob.glob(spec, recursive=True) if Path(file).is_file())
        if not found:
            raise UserError(f"no file matches {spec}")
        return [file for match in found for file in files_of(match)]
    if not format_of(path) and (not spec or not path.exists()):
        raise UserError(
            f"data {spec!r} is neither a file ({_KNOWN}), nor a folder or a pattern of files, nor a hub data set "
            "(ORG/NAME, with :SPLIT, :CONFIG or :CONFIG:SPLIT)"
        )
    _check(path)
    return [spec]


def _check(path: Path) -> None:
    """Check that a file exists and has a known format."""
    if not path.parent.is_dir():
        raise UserError(f"{path} does not exist, nor does its folder {path.parent}")
    if not path.exists():
        names = {entry.stem: entry for entry in sorted(path.parent.iterdir())}  # a common ending is no likeness
        close = difflib.get_close_matches(path.stem, names, n=1)
        raise UserError(f"{path} does not exist" + (f"; did you mean {names[close[0]]}?" if close else ""))
    if not format_of(path):
        raise UserError(f"{path} has no suffix of a known format: use one of {_KNOWN}")


def default_sources(files: Sequence[str]) -> list[str]:
    """Name the source of each file's rows, unless they name one: the shortest part of its path that tells it apart."""
    parts = [_parts(file) for file in files]
    alike: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for names in parts:
        alike[names[-1]].add(names)
    places = {names: _place_apart(names, alike[names[-1]]) for names in parts}
    counts = Counter(names[-place] for names, place in places.items())
    # A folder may be called like another file: then it needs the parts below it too.
    return [
        names[-place] if counts[names[-place]] == 1 else "/".join(names[-place:])
        for names, place in ((names, places[names]) for names in parts)
    ]


def _place_apart(names: tuple[str, ...], alike: Iterable[tuple[str, ...]]) -> int:
    """Return the place, counted from the end, of the part in which a path differs from all others that end alike."""
    others = [other for other in alike if other != names]
    places = range(1, len(names) + 1)
    return next(
        (at for at in places if all(len(other) < at or other[-at] != names[-at] for other in others)), len(names)
    )


def _parts(spec: str) -> tuple[str, ...]:
    """Split a path into parts, the last of which names a source if it tells the file apart, and the first if no other.

    They are a file's name, its folders, and its name without suffix; of a hub data set, the name
    alone, with configuration, with split, and with both.
    """
    if hub := hub_set(spec):
        return str(hub), f"{hub.name}:{hub.split}", str(HubSet(hub.name, hub.config, "")), hub.name
    path = Path(spec).absolute()
    suffix = "".join(path.suffixes[-2:] if path.suffix.lower() in COMPRESSED else path.suffixes[-1:])
    return path.name, *path.parts[1:-1], path.name.removesuffix(suffix)
