"""Hostfiles with a replaced resolver, and ranks that do not reach each other, in real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from support.commands import ROOT, free_port

from colm_scale.distributed.connectivity import Reach
from colm_scale.doctor import network
from colm_scale.doctor.network import check_hostfile, check_ranks, findings_of

DEAF = """
import socket
from colm_scale.distributed import connectivity

connectivity._CONNECT_SECONDS = 0.5
if {deaf}:
    connectivity._Meeting._answer = lambda self: None
from colm_scale.doctor.network import _main
_main()
"""


def start(rank: int, ranks: int, port: int, *, deaf: bool = False, seconds: float = 3.0) -> subprocess.Popen:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ROOT}
    return subprocess.Popen(
        [sys.executable, "-c", DEAF.format(deaf=deaf), str(seconds)],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(first: subprocess.Popen, *others: subprocess.Popen) -> Reach:
    started = time.monotonic()
    said, _ = first.communicate(timeout=60)
    for other in others:
        other.communicate(timeout=30)
    assert time.monotonic() - started < 60
    return Reach(**json.loads(said.splitlines()[-1]))


def test_ranks_that_reach_each_other():
    port = free_port()
    found = answer(start(0, 2, port), start(1, 2, port))
    assert found == Reach(2, failed={"gloo": ""})
    assert [finding.status for finding in findings_of(found)] == ["ok"]


def test_the_pair_that_is_cut_is_named_and_so_is_a_rank_that_did_not_come():
    port = free_port()
    found = answer(start(0, 3, port), start(1, 3, port, deaf=True))
    assert found.absent == [2]
    assert [pair[:2] for pair in found.cut] == [[0, 1]]
    assert found.failed == {}  # nothing is begun that would hang
    said = [finding.what for finding in findings_of(found)]
    assert "rank 2 did not connect" in said[0]
    assert "rank 0 cannot connect to rank 1 (127.0.0.1:" in said[1]
    assert {finding.status for finding in findings_of(found)} == {"problem"}


def test_a_meeting_point_that_is_not_there():
    found = answer(start(1, 2, free_port(), seconds=1.0))
    assert "rank 1 cannot reach the meeting point 127.0.0.1:" in found.error
    assert findings_of(found)[0].status == "problem"


def test_other_versions_and_a_backend_that_fails_are_problems():
    found = findings_of(Reach(2, failed={"gloo": "", "nccl": "unhandled system error"}, versions={0: "a 1", 1: "a 2"}))
    assert [finding.status for finding in found] == ["problem", "ok", "problem"]
    assert "rank 1: a 2" in found[0].what
    assert "NCCL_SOCKET_IFNAME" in found[2].way_out


def test_a_local_process_that_says_nothing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(network, "__name__", "colm_scale.no_such_module")
    (found,) = check_ranks(1, 1.0)
    assert found.status == "problem"
    assert "No module named" in found.what


def test_none_are_started_where_none_are_asked_for(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert check_ranks(0, 1.0) == []


NAMES = {"10.0.0.1": "10.0.0.1", "10.0.0.2": "10.0.0.2", "me": "127.0.1.1", "far": "10.0.0.9"}


@pytest.fixture
def names(monkeypatch):
    def resolve(host, *_, **__):
        if host == "slow":
            time.sleep(5)
        if host not in NAMES:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (NAMES[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def check(tmp_path, content: str):
    path = tmp_path / "hosts.txt"
    path.write_text(content, "utf-8")
    return check_hostfile(str(path), seconds=0.2)


def test_a_good_file(names, tmp_path):
    (found,) = check(tmp_path, "# ours\n10.0.0.1 slots=8\n\nfar slots=4  # newer\n")
    assert found.status == "ok"
    assert found.what.startswith("2 host(s), 12 ranks")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("10.0.0.1 slots=8\n10.0.0.2 slot=8\n", "line 2 is '10.0.0.2 slot=8'"),
        ("10.0.0.1 slots=0\n", "line 1"),
        ("10.0.0.1\n", "line 1"),
        ("# nobody\n", "lists no host"),
        ("10.0.0.1 slots=8\n10.0.0.1 slots=8\n", "10.0.0.1 is listed 2 times"),
        ("me slots=8\n10.0.0.2 slots=8\n", "me is 127.0.1.1 on this host"),
        ("nowhere slots=8\n", "nowhere does not resolve"),
        ("slow slots=8\n", "slow takes too long to resolve"),
    ],
)
def test_what_is_wrong_is_named(names, tmp_path, content, words):
    found = check(tmp_path, content)
    assert [finding.status for finding in found] == ["problem"]
    assert words in found[0].what
    assert found[0].way_out


def test_one_host_may_be_the_loopback(names, tmp_path):
    assert check(tmp_path, "me slots=2\n")[0].status == "ok"


def test_a_file_that_is_not_there(names, tmp_path):
    (found,) = check_hostfile(str(tmp_path / "none"), 1.0)
    assert (found.status, "No such file" in found.what) == ("problem", True)
