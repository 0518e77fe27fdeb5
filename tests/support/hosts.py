"""Two hosts on one machine: connected network namespaces.

Each has its own address and name; the names do not resolve, as in many clusters. Both share the file system, but for
folders that a command is given of its own. Requires root.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from support.commands import wait_until


class NoHosts(RuntimeError):
    """This machine does not permit network namespaces; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host: its name (also of its namespace) and address."""

    name: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """Command prefix that runs a command on this host."""
        named = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", named, self.name, *arguments]

    def with_own(self, folder: Path, own: Path, command: Sequence[str]) -> list[str]:
        """A command that finds another folder, its host's own, where the other hosts find ``folder``."""
        mounted = 'mount --bind "$0" "$1" && shift && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mounted, str(own), str(folder), *command]

    def alive(self) -> list[int]:
        """Processes on this host."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Kill all processes at once, as if the host were lost."""
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two connected hosts; at the end they are removed with all their processes.

    Raises:
        NoHosts: Namespaces are not permitted, or there is no ``ip`` command.
    """
    hosts = tuple(Host(f"colm-{os.getpid()}-{place}", f"10.77.0.{place}") for place in (1, 2))
    try:
        try:
            _connect(hosts)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoHosts(f"no network namespaces: {getattr(error, 'stderr', None) or error}".strip()) from None
        yield hosts
    finally:
        for host in hosts:
            with suppress(OSError, subprocess.CalledProcessError):
                host.kill()
                wait_until(lambda: not host.alive(), 10)  # noqa: B023
                _ip("netns", "delete", host.name)


def _connect(hosts: Sequence[Host]) -> None:
    first, second = hosts
    for host in hosts:
        _ip("netns", "add", host.name)
    _ip("link", "add", "eth0", "netns", first.name, "type", "veth", "peer", "name", "eth0", "netns", second.name)
    for host in hosts:
        _ip("-netns", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-netns", host.name, "link", "set", interface, "up")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
