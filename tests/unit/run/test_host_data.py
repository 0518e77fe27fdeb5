"""Data that is read once per host; ranks are threads. Processes do the same in tests/distributed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.threads import on_ranks

from colm_scale.config import DataConfig, ModelConfig
from colm_scale.config.cache import cache_folder
from colm_scale.data import reading
from colm_scale.data.examples import tokenise
from colm_scale.data.readers import Columns, Row
from colm_scale.data.reading import Reading
from colm_scale.data.tokenised import TokenFolder, Tokenised
from colm_scale.distributed.group import Group, PeerFailed
from colm_scale.errors import UserError
from colm_scale.modeling.load import load_tokenizer
from colm_scale.run import host_data
from colm_scale.run.host_data import once_per_host

TEMPORARY = ("shm", "tmp")


class Hosts:
    """Two ranks and the file systems that they see.

    Attributes:
        local_ranks: Of each rank, on its host.
        folders: Of each rank, where its caches and temporary folders are.
        readers: Ranks that have tokenised rows.
    """

    def __init__(self, folder: Path, local_ranks: tuple[int, int]):
        self.local_ranks, self.readers = local_ranks, []
        self.folders = [folder / "one", folder / "one"]
        self.lines: list[str] = []
        self.here = threading.local()

    def read(self, one: Reading) -> list[Tokenised | Exception]:
        """What each rank gets or raises."""

        def work(group: Group) -> Tokenised:
            self.here.rank = group.rank
            group.local_rank = self.local_ranks[group.rank]
            group.local_world_size = 1 + max(self.local_ranks)
            return once_per_host(one, group)

        return on_ranks(2, work)

    @property
    def folder(self) -> Path:
        """Of the rank that asks."""
        return self.folders[self.here.rank]

    def left(self) -> list[str]:
        """What is in the temporary folders."""
        return [path.name for folder in self.folders for place in TEMPORARY for path in (folder / place).glob("*")]


@pytest.fixture
def make_hosts(tmp_path, monkeypatch):
    def make(*local_ranks: int) -> Hosts:
        hosts = Hosts(tmp_path, local_ranks)

        def counting(*arguments):
            hosts.readers.append(hosts.here.rank)
            return tokenise(*arguments)

        def of_this_rank() -> list[Path]:
            name = f"colm_scale-{hosts.here.rank}"
            return [hosts.folder / place / name for place in TEMPORARY]

        def seen(path: Path, *, verify: bool) -> Tokenised:
            if not path.is_relative_to(hosts.folder):
                raise FileNotFoundError(path)
            return opened(path, verify=verify)

        opened = host_data.open_file
        monkeypatch.setattr(reading, "tokenise", counting)
        monkeypatch.setattr(reading, "cache_folder", lambda: cache_folder({"HOME": str(hosts.folder)}))
        monkeypatch.setattr(host_data, "_temporary_folders", of_this_rank)
        monkeypatch.setattr(host_data, "_warn", hosts.lines.append)
        monkeypatch.setattr(host_data, "open_file", seen)
        return hosts

    return make


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig())


@pytest.fixture
def one(tmp_path, tokenizer) -> Reading:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}"}) + "\n" for n in range(20)))
    return Reading("train", DataConfig(train=[str(path)]), tokenizer, 64)


def test_one_rank_of_a_host_reads_and_both_map_its_file(make_hosts, one):
    hosts = make_hosts(0, 1)
    for _ in range(2):
        first, second = hosts.read(one)
        assert first.digest == second.digest == second.examples.digest()
        assert first.file == second.file != ""
        assert len(second.examples) == 20
    assert hosts.readers == [0]
    assert not hosts.lines


def test_each_host_reads_once(make_hosts, one):
    hosts = make_hosts(0, 0)
    hosts.folders[1] = hosts.folders[0].with_name("two")
    first, second = hosts.read(one)
    assert first.digest == second.digest
    assert first.file != second.file
    assert sorted(hosts.readers) == [0, 1]
    hosts.read(one)
    assert len(hosts.readers) == 2


def test_a_rank_that_does_not_see_the_file_reads_for_itself(make_hosts, one):
    """In a container of its own on the same host."""
    hosts = make_hosts(0, 1)
    hosts.folders[1] = hosts.folders[0].with_name("two")
    first, second = hosts.read(one)
    assert first.digest == second.digest == second.examples.digest()
    assert second.file.startswith(str(hosts.folders[1]))
    assert hosts.readers == [0, 1]
    assert not hosts.lines


def test_without_a_cache_all_map_a_temporary_file_that_is_then_removed(make_hosts, one):
    hosts = make_hosts(0, 1)
    hosts.folders[0].mkdir()
    (hosts.folders[0] / ".cache").touch()
    first, second = hosts.read(one)
    assert first.file == second.file == str(hosts.folders[0] / "shm/colm_scale-0" / Path(first.file).name)
    assert first.examples.digest() == second.examples.digest() == first.digest
    assert hosts.readers == [0]
    assert not hosts.left()
    (line,) = hosts.lines
    assert line.startswith("warning: ")
    assert "COLM_SCALE_CACHE" in line


def test_without_any_folder_every_rank_reads(make_hosts, one):
    hosts = make_hosts(0, 1)
    hosts.folders[0].touch()
    first, second = hosts.read(one)
    assert (first.file, second.file) == ("", "")
    assert first.digest == second.digest
    assert hosts.readers == [0, 1]


def test_a_bad_row_is_one_message_and_ends_both(make_hosts, one):
    hosts = make_hosts(0, 1)
    with Path(one.config.train[0]).open("a") as file:
        file.write('{"prompt": 3}\n')
    first, second = hosts.read(one)
    assert isinstance(first, UserError)
    assert "rows.jsonl line 21" in str(first)
    assert isinstance(second, PeerFailed)
    assert not hosts.left()


def test_hosts_with_different_data_are_refused(make_hosts, one, monkeypatch):
    hosts = make_hosts(0, 0)
    hosts.folders[1] = hosts.folders[0].with_name("two")
    rows = Reading.rows

    def fewer(self: Reading, columns: Columns) -> Iterator[Row]:
        return (row for row in rows(self, columns) if row.id or not hosts.here.rank)

    monkeypatch.setattr(Reading, "rows", fewer)
    first, second = hosts.read(one)
    assert isinstance(first, UserError)
    assert "rank 1 and rank 0 differ in training data" in str(first)
    assert isinstance(second, PeerFailed)  # or it could be the one that prints, as if the fault were its own


def test_one_process_needs_no_temporary_folder(make_hosts, one, monkeypatch):
    hosts = make_hosts(0, 0)
    hosts.folders[0].touch()

    def none() -> list[Path]:
        raise AssertionError("there is nobody to share with")

    monkeypatch.setattr(host_data, "_temporary_folders", none)
    first, _ = hosts.read(one)
    assert len(first.examples) == 20


def test_a_temporary_file_is_mapped_before_the_caches_of_other_hosts(one, monkeypatch, tmp_path):
    """The cache of this host may have the same name and be damaged, where it could not be written."""
    monkeypatch.setenv("COLM_SCALE_CACHE", str(tmp_path / "a cache"))
    read = one.tokenised()
    files = [TokenFolder(folder).store(read.digest, read).file for folder in (cache_folder(), tmp_path / "temporary")]
    assert host_data._mapped(files).file == files[1]
    Path(files[1]).unlink()
    assert host_data._mapped(["", *files]).file == files[0]
    Path(files[0]).write_bytes(b"")
    assert host_data._mapped(files) is None
