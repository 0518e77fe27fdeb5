from __future__ import annotations

import socket
import time

import pytest

from colm_scale.doctor.hosts import check_hostfile

NAMES = {"10.0.0.1": "10.0.0.1", "10.0.0.2": "10.0.0.2", "me": "127.0.1.1", "far": "10.0.0.9"}


@pytest.fixture(autouse=True)
def _names(monkeypatch):
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


def test_a_good_file(tmp_path):
    (found,) = check(tmp_path, "# ours\n10.0.0.1 slots=8\n\nfar slots=4  # newer\n")
    assert found.status == "ok"
    assert found.what.startswith("2 host(s), 12 ranks")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("10.0.0.1 slots=8\n10.0.0.2 slot=8\n", "line 2 is '10.0.0.2 slot=8'"),
        ("10.0.0.1 slots=0\n", "line 1"),
        ("10.0.0.1\n", "line 1"),
        ("# nobody\n", "names no host"),
        ("10.0.0.1 slots=8\n10.0.0.1 slots=8\n", "10.0.0.1 is there 2 times"),
        ("me slots=8\n10.0.0.2 slots=8\n", "me is 127.0.1.1 on this host"),
        ("nowhere slots=8\n", "nowhere does not resolve"),
        ("slow slots=8\n", "slow takes too long to resolve"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, words):
    found = check(tmp_path, content)
    assert [finding.status for finding in found] == ["problem"]
    assert words in found[0].what
    assert found[0].way_out


def test_one_host_may_be_the_loopback(tmp_path):
    assert check(tmp_path, "me slots=2\n")[0].status == "ok"


def test_a_file_that_is_not_there(tmp_path):
    (found,) = check_hostfile(str(tmp_path / "none"), 1.0)
    assert (found.status, "No such file" in found.what) == ("problem", True)
