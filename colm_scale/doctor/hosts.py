"""A hostfile of the DeepSpeed launcher, and the names in it."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections import Counter
from pathlib import Path

from colm_scale.doctor.finding import Finding, within

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_LINK = "https://www.deepspeed.ai/getting-started/#resource-configuration-multi-node"


def check_hostfile(path: str, seconds: float) -> list[Finding]:
    """Every line of it: is it one, and does its host's name lead to that host?

    Args:
        seconds: How long a name may take to resolve.
    """
    about = f"hostfile {path}"
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [Finding(about, "problem", f"cannot be read: {getattr(error, 'strerror', None) or error}")]
    hosts, findings = read_hosts(text, about)
    for name, times in Counter(host for host, _ in hosts).items():
        if times > 1:
            findings.append(Finding(about, "problem", f"{name} is there {times} times", "give a host one line"))
    several = len({host for host, _ in hosts}) > 1
    findings += [found for host in dict(hosts) if (found := _resolved(about, host, seconds, several=several))]
    if not findings:
        slots = sum(count for _, count in hosts)
        findings.append(Finding(about, "ok", f"{len(hosts)} host(s), {slots} ranks; their names resolve"))
    return findings


def read_hosts(text: str, about: str) -> tuple[list[tuple[str, int]], list[Finding]]:
    """Hosts and their slots, and what is wrong with the lines."""
    hosts, findings = [], []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None or int(found[2]) == 0:
            way_out = "write a line per host: 10.0.0.1 slots=8"
            findings.append(Finding(about, "problem", f"line {number} is {line!r}", way_out, _LINK))
        else:
            hosts.append((found[1], int(found[2])))
    if not hosts and not findings:
        findings.append(Finding(about, "problem", "names no host", "write a line per host: 10.0.0.1 slots=8", _LINK))
    return hosts, findings


def _resolved(about: str, host: str, seconds: float, *, several: bool) -> Finding | None:
    """What is wrong with a name."""
    found = within(lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM), seconds)
    if isinstance(found, Exception):
        why = "takes too long to resolve" if isinstance(found, TimeoutError) else f"does not resolve ({found})"
        return Finding(about, "problem", f"{host} {why}", "give its address, or mend DNS or /etc/hosts")
    addresses = sorted({str(entry[4][0]) for entry in found})
    if several and all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses):
        what = f"{host} is {', '.join(addresses)} on this host: others cannot reach it there"
        way_out = "give an address that all hosts reach, or take the name off 127.x in /etc/hosts"
        return Finding(about, "problem", what, way_out)
    return None
