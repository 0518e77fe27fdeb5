"""Checks of the network: host names in a hostfile, and connections between ranks.

``python -m colm_scale.doctor.network SECONDS`` is one rank of the connection check; it prints a `Reach` as JSON.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from colm_scale.distributed.connectivity import Reach, try_ranks
from colm_scale.distributed.group import launched
from colm_scale.doctor.finding import Finding, within

_ROOT = Path(__file__).parents[2]
_START_SECONDS = 60.0
"""Time for a process to import torch, added to the time for the check itself."""
_INTERFACES = (
    "name the right network interface with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and open the ports between hosts"
)
_HOSTFILE_LINE = re.compile(r"(\S+)\s+slots=(0*[1-9]\d*)")
_HOSTFILE_FIX = "write one line per host, such as 10.0.0.1 slots=8"
_HOSTFILE_LINK = "https://www.deepspeed.ai/getting-started/#resource-configuration-multi-node"


def check_hostfile(path: str, seconds: float) -> list[Finding]:
    """Check the syntax of a DeepSpeed hostfile and resolve its host names.

    Args:
        seconds: Limit for resolving one name.
    """
    about = f"hostfile {path}"
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [Finding(about, "problem", f"cannot be read: {getattr(error, 'strerror', None) or error}")]
    hosts, findings = read_hosts(text, about)
    for name, times in Counter(host for host, _ in hosts).items():
        if times > 1:
            findings.append(Finding(about, "problem", f"{name} is listed {times} times", "list each host once"))
    several = len({host for host, _ in hosts}) > 1
    findings += [found for host in dict(hosts) for found in _check_name(about, host, seconds, several=several)]
    if not findings:
        slots = sum(count for _, count in hosts)
        findings.append(Finding(about, "ok", f"{len(hosts)} host(s), {slots} ranks; all names resolve"))
    return findings


def read_hosts(text: str, about: str) -> tuple[list[tuple[str, int]], list[Finding]]:
    """Parse the hosts and their slots; lines that cannot be parsed become findings."""
    hosts, findings = [], []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        if found := _HOSTFILE_LINE.fullmatch(line):
            hosts.append((found[1], int(found[2])))
        else:
            findings.append(Finding(about, "problem", f"line {number} is {line!r}", _HOSTFILE_FIX, _HOSTFILE_LINK))
    if not hosts and not findings:
        findings.append(Finding(about, "problem", "lists no host", _HOSTFILE_FIX, _HOSTFILE_LINK))
    return hosts, findings


def _check_name(about: str, host: str, seconds: float, *, several: bool) -> list[Finding]:
    """Report a host name that does not resolve, or that of several hosts resolves to the loopback interface."""
    found = within(lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM), seconds)
    if isinstance(found, Exception):
        why = "takes too long to resolve" if isinstance(found, TimeoutError) else f"does not resolve ({found})"
        return [Finding(about, "problem", f"{host} {why}", "use its address, or fix DNS or /etc/hosts")]
    addresses = sorted({str(entry[4][0]) for entry in found})
    if several and all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses):
        what = f"{host} is {', '.join(addresses)} on this host; other hosts cannot reach it there"
        way_out = "use an address that all hosts can reach, or remove the name from the 127.x line of /etc/hosts"
        return [Finding(about, "problem", what, way_out)]
    return []


def check_ranks(ranks: int, seconds: float) -> list[Finding]:
    """Check that ranks reach each other. The first rank reports; others report only that they could not join.

    Args:
        ranks: Local processes to start if no launcher started this one; 0 skips the check.
        seconds: Limit for each stage.
    """
    if launched():
        reach = try_ranks(seconds)
        return findings_of(reach) if os.environ["RANK"] == "0" or reach.error else []
    return findings_of(_try_local(ranks, seconds)) if ranks else []


def findings_of(reach: Reach) -> list[Finding]:
    """Turn the result into findings with advice."""
    about = f"{reach.ranks} rank(s)"
    if reach.error:
        way_out = "set MASTER_ADDR to an address that every host can reach, and MASTER_PORT to a free, open port"
        return [Finding(about, "problem", reach.error, way_out)]
    found = [
        Finding(about, "problem", f"rank {rank} did not connect to MASTER_ADDR: did it start?", _INTERFACES)
        for rank in reach.absent
    ]
    found += [
        Finding(about, "problem", f"rank {rank} cannot connect to rank {peer} ({why})", _INTERFACES)
        for rank, peer, why in reach.cut
    ]
    if reach.versions:
        said = "; ".join(f"rank {rank}: {versions}" for rank, versions in reach.versions.items())
        found.append(Finding(about, "problem", f"versions differ: {said}", "install the same versions on every host"))
    for backend, why in reach.failed.items():
        if why:
            found.append(Finding(f"{about}: {backend}", "problem", why, _INTERFACES))
        else:
            found.append(Finding(f"{about}: {backend}", "ok", "all ranks reach each other"))
    return found


def _try_local(ranks: int, seconds: float) -> Reach:
    """Run the check among local processes and stop them afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", __name__, str(seconds)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        return _answer_of(started[0], ranks, _START_SECONDS + 6 * seconds)
    finally:
        time.sleep(0.1)  # the others exit a moment after the first
        for process in started:
            process.kill()
            process.communicate()


def _answer_of(first: subprocess.Popen[str], ranks: int, seconds: float) -> Reach:
    try:
        said, complained = first.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Reach(ranks, error=f"local processes did not answer within {seconds:g} s")
    try:
        return Reach(**json.loads(said.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        why = (complained.strip().splitlines() or [f"exit code {first.returncode}"])[-1]
        return Reach(ranks, error=f"a local process failed: {why}")


def _main() -> None:
    print(json.dumps(dataclasses.asdict(try_ranks(float(sys.argv[1])))), flush=True)
    os._exit(0)  # do not wait for threads that a backend left hanging


if __name__ == "__main__":
    _main()
