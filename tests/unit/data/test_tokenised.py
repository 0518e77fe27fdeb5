"""Files of tokenised examples, and the folder that holds them."""

from __future__ import annotations

import dataclasses
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from colm_scale.data import tokenised
from colm_scale.data.examples import Examples, offsets_of
from colm_scale.data.tokenised import Damaged, NotStored, TokenFolder, Tokenised, open_file

KEY, OTHER, THIRD = "a1" * 32, "b2" * 32, "c3" * 32
DAY = 24 * 3600.0


def some(first_id: int = 3, examples: int = 3) -> Tokenised:
    """Data whose contents depend on both arguments."""
    ids = torch.arange(first_id, first_id + examples)
    found = Examples(
        tokens=torch.arange(2 * examples, dtype=torch.int32) + first_id,
        labelled=torch.tensor([False, True] * examples),
        offsets=offsets_of(torch.full_like(ids, 2)),
        ids=ids,
        sources=ids % 2,
        protected=ids % 2 == 0,
        source_names=("é", "ö"),
        dropped={"z": 2, "a": 1},
        cut={"ö": 1},
    )
    return Tokenised(found, found.digest(), "of the rows")


def test_what_was_stored_is_found_mapped_and_equal(tmp_path):
    stored, folder = some(), TokenFolder(tmp_path / "new/tokens")
    assert folder.find(KEY) is None
    first = folder.store(KEY, stored)
    for found in (first, folder.find(KEY)):
        assert (found.digest, found.rows_digest) == (stored.digest, "of the rows")
        assert found.examples.digest() == stored.digest
        assert [*found.examples.dropped] == ["z", "a"], "in the order in which they are printed"
        assert found.file == str(tmp_path / f"new/tokens/{KEY}.safetensors")
        assert found.file in Path("/proc/self/maps").read_text("utf-8")
        assert all(getattr(found.examples, name).dtype == getattr(stored.examples, name).dtype for name in NAMES)
    assert [path.name for path in (tmp_path / "new/tokens").iterdir()] == [f"{KEY}.safetensors"]
    assert (tmp_path / "new/tokens").stat().st_mode & 0o077 == 0
    assert folder.find(OTHER) is None


NAMES = ("tokens", "labelled", "offsets", "ids", "sources", "protected")


def test_what_is_written_to_mapped_examples_stays_in_this_process(tmp_path):
    folder = TokenFolder(tmp_path)
    folder.store(KEY, some()).examples.tokens[0] = 99
    assert folder.find(KEY).examples.digest() == some().digest


def test_mapped_examples_outlive_their_file(tmp_path):
    found = TokenFolder(tmp_path).store(KEY, some())
    Path(found.file).unlink()
    assert found.examples.digest() == some().digest


def damaged(path: Path) -> dict[str, bytes]:
    """Ways in which a file may be wrong."""
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")

    def flipped(place: int) -> bytes:
        return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]

    digest = whole.index(b"of the rows")
    return {
        "empty": b"",
        "cut in its header": whole[: header // 2],
        "cut in its tensors": whole[:-3],
        "longer": whole + b"\0" * 8,
        "no safetensors": b"PK" * 100,
        "no facts": whole.replace(b'"facts"', b'"tcafs"'),
        "a bit in the digest of the rows": flipped(digest),
        **{f"a bit in byte {place}": flipped(place) for place in range(0, len(whole), 7)},
    }


def test_every_damage_is_detected(tmp_path):
    folder = TokenFolder(tmp_path)
    path = Path(folder.store(KEY, some()).file)
    ways = damaged(path)
    assert len(ways) > 20
    for content in ways.values():
        path.write_bytes(content)
        with pytest.raises(Damaged, match=rf"{KEY}\.safetensors is damaged \(.+\)"):
            folder.find(KEY)
    folder.store(KEY, some())
    assert folder.find(KEY).digest == some().digest


def test_a_file_that_is_cut_is_detected_without_reading_it_whole(tmp_path):
    path = Path(TokenFolder(tmp_path).store(KEY, some()).file)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged):
        open_file(path, verify=False)


def test_writers_of_the_same_key_do_not_disturb_each_other(tmp_path):
    folder, same = TokenFolder(tmp_path), some(examples=5000)

    def store(_: int) -> set[str]:
        stored = folder.store(KEY, same)
        return {stored.examples.digest(), folder.find(KEY).digest}

    with ThreadPoolExecutor(4) as pool:
        assert set().union(*pool.map(store, range(40))) == {same.digest}
    assert len(list(tmp_path.iterdir())) == 1


@contextmanager
def at_most(size: int):
    """No file can become larger, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_cannot_hold_the_data_is_named_and_left_clean(tmp_path):
    with pytest.raises(NotStored, match=str(tmp_path)), at_most(1000):
        TokenFolder(tmp_path).store(KEY, some(examples=1000))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(NotStored, match="file/tokens cannot hold"):
        TokenFolder(tmp_path / "file/tokens").store(KEY, some())


def aged(path: Path, days: float) -> Path:
    now = path.stat().st_mtime
    os.utime(path, (now - days * DAY, now - days * DAY))
    return path


def test_what_was_not_used_for_longest_is_removed(tmp_path, monkeypatch):
    folder = TokenFolder(tmp_path)
    files = {key: Path(folder.store(key, some()).file) for key in (KEY, OTHER, THIRD)}
    size = files[KEY].stat().st_size
    monkeypatch.setattr(tokenised, "_MOST_BYTES", 3 * size)
    for key, days in ((KEY, 10), (OTHER, 9), (THIRD, 8)):
        aged(files[key], days)
    folder.find(KEY)  # is a use
    folder.store("d4" * 32, some())
    assert {path.name[:2] for path in tmp_path.iterdir()} == {"a1", "c3", "d4"}


def test_what_was_used_in_the_last_week_stays_however_large(tmp_path, monkeypatch):
    folder = TokenFolder(tmp_path)
    monkeypatch.setattr(tokenised, "_MOST_BYTES", 0)
    aged(Path(folder.store(KEY, some()).file), 6)
    folder.store(OTHER, some())
    assert len(list(tmp_path.iterdir())) == 2


def test_only_its_own_files_are_removed(tmp_path, monkeypatch):
    """A user may point the variable at any folder."""
    monkeypatch.setattr(tokenised, "_MOST_BYTES", 0)
    theirs = ("model.safetensors", f"{KEY}.json", ".hidden", "notes.txt", f"{KEY[:-1]}.safetensors")
    parts = (f".{KEY}-{'0' * 32}", ".tmpAb12Cd")
    for name in (*theirs, *parts):
        aged_file = tmp_path / name
        aged_file.touch()
        aged(aged_file, 100)
    new = tmp_path / f".{KEY}-{'1' * 32}"
    new.touch()
    TokenFolder(tmp_path).store(OTHER, some())
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, new.name, f"{OTHER}.safetensors"}


def test_digests_are_those_of_earlier_versions():
    """Checkpoints hold them."""
    assert some().digest == "bfee862e01bf66917219996694b96e6ef3f088bfbecfb366ee1761fdb8a936e3"
    assert dataclasses.replace(some().examples, cut={}).digest() != some().digest
