"""Whether ranks reach each other: those of the launcher, or some local processes that are started for it.

``python -m colm_scale.doctor.ranks SECONDS`` is one such process; it prints what it has found as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from colm_scale.distributed.connectivity import Reach, try_ranks
from colm_scale.distributed.group import launched
from colm_scale.doctor.finding import Finding

_ROOT = Path(__file__).parents[2]
_START_SECONDS = 60.0
"""What a process may take to import torch, beside what it is given to find out."""
_INTERFACES = (
    "name the right network interface with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and open the ports between hosts"
)


def check_ranks(ranks: int, seconds: float) -> list[Finding]:
    """Findings of the first rank; none on the others.

    Args:
        ranks: Local processes to start, if no launcher has started this one; 0: none.
        seconds: For each stage.
    """
    if launched():
        reach = try_ranks(seconds)
        return findings_of(reach) if os.environ["RANK"] == "0" or reach.error else []
    if not ranks:
        return []
    return findings_of(_among_local(ranks, seconds))


def findings_of(reach: Reach) -> list[Finding]:
    """What a user can do about it."""
    about = f"{reach.ranks} rank(s)"
    if reach.error:
        way_out = "MASTER_ADDR must be an address that every host reaches, its port open and free"
        return [Finding(about, "problem", reach.error, way_out)]
    found = [
        Finding(about, "problem", f"rank {rank} did not come to the meeting point: did it start?", _INTERFACES)
        for rank in reach.absent
    ]
    found += [
        Finding(about, "problem", f"rank {rank} cannot connect to rank {peer} ({why})", _INTERFACES)
        for rank, peer, why in reach.cut
    ]
    if reach.versions:
        said = "; ".join(f"rank {rank}: {versions}" for rank, versions in reach.versions.items())
        found.append(Finding(about, "problem", f"not the same versions: {said}", "install the same on every host"))
    for backend, why in reach.failed.items():
        if why:
            found.append(Finding(f"{about}: {backend}", "problem", why, _INTERFACES))
        else:
            found.append(Finding(f"{about}: {backend}", "ok", "every rank reaches every other"))
    return found


def _among_local(ranks: int, seconds: float) -> Reach:
    """What local processes find out. All of them are gone at the end."""
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
        time.sleep(0.1)  # the others end by themselves, a moment after the first
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
    os._exit(0)  # whatever a backend has left hanging


if __name__ == "__main__":
    _main()
