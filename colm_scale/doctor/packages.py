"""Installed packages against the tested version ranges and known bad combinations."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from colm_scale.doctor.finding import Finding, Status

_DEVELOPERS = "dev"
"""The extra with development tools, which a run does not need."""
_DISPENSABLE = {"deepspeed": "only --ds_config needs it; DDP and FSDP2 do not"}
"""Required packages that most runs can do without, and why."""


@dataclass(frozen=True, slots=True)
class KnownBad:
    """Versions with a known fault.

    Attributes:
        package: Name in the registry.
        versions: Version specifier, such as ``<0.19.8``; "" matches all.
        reason: Description of the fault.
        together_with: Other packages and specifiers that must be installed too for the fault to appear.
    """

    package: str
    versions: str
    status: Status
    reason: str
    way_out: str
    link: str
    together_with: tuple[tuple[str, str], ...] = ()

    def applies(self, installed: Mapping[str, str]) -> bool:
        """True if all these versions are installed."""
        wanted = ((self.package, self.versions), *self.together_with)
        return all(name in installed and _contains(versions, installed[name]) for name, versions in wanted)


KNOWN_BAD = (
    KnownBad(
        "deepspeed",
        "<0.19.8",
        "problem",
        "LoRA under ZeRO-3 with activation checkpointing fails: saved and recomputed tensors differ in shape",
        "pip install 'deepspeed>=0.19.8'",
        "https://github.com/deepspeedai/DeepSpeed/pull/8148",
    ),
    KnownBad(
        "deepspeed",
        "<0.14.1",
        "problem",
        "does not run on CPUs with gloo",
        "pip install 'deepspeed>=0.19.8'",
        "https://github.com/deepspeedai/DeepSpeed/issues/5313",
    ),
    KnownBad(
        "accelerate",
        "<1.15",
        "warning",
        "transformers' Trainer under FSDP2 with full state dicts saves only rank 0's shard of an adapter "
        "(colm-scale train collects all shards)",
        "pip install 'accelerate>=1.15'",
        "https://github.com/huggingface/accelerate/pull/4206",
        (("peft", ""), ("transformers", "")),
    ),
    KnownBad(
        "pynvml",
        "",
        "warning",
        "the deprecated package pynvml overwrites the module of nvidia-ml-py",
        "pip uninstall pynvml, then pip install --force-reinstall nvidia-ml-py",
        "https://github.com/intelligent-machine-learning/dlrover/issues/1699",
    ),
)
"""Each link leads to the bug report or its fix."""


def check_packages() -> list[Finding]:
    """Check all required packages, installed optional ones, and `KNOWN_BAD`."""
    installed = installed_versions()
    return [_python(), *against_ranges(_requirements(), installed), *known_bad(installed)]


def installed_versions() -> dict[str, str]:
    """Version of every installed package, by name in lower case with dashes."""
    found = ((item.metadata["Name"], item.version) for item in metadata.distributions())
    return {_plain(name): version for name, version in found if name}


def against_ranges(requirements: list[Requirement], installed: Mapping[str, str]) -> list[Finding]:
    """Compare required and installed optional packages with the tested ranges, each package once."""
    found: dict[str, Finding] = {}
    for wanted in requirements:
        name = _plain(wanted.name)
        if name in installed:
            found[name] = _against_range(wanted, installed[name])
        elif not wanted.marker:  # not of an extra
            found[name] = _missing(wanted)
    return list(found.values())


def known_bad(installed: Mapping[str, str]) -> list[Finding]:
    """One finding for each entry of `KNOWN_BAD` that is installed."""
    return [
        Finding(f"{bad.package} {installed[_plain(bad.package)]}", bad.status, bad.reason, bad.way_out, bad.link)
        for bad in KNOWN_BAD
        if bad.applies(installed)
    ]


def _python() -> Finding:
    version = platform.python_version()
    if Version(version) < Version("3.11"):
        return Finding("python", "problem", version, "use Python 3.11 or newer")
    return Finding("python", "ok", version)


def _requirements() -> list[Requirement]:
    """Requirements of a run; none in a checkout that was never installed."""
    try:
        found = [Requirement(line) for line in metadata.requires("colm_scale") or ()]
    except metadata.PackageNotFoundError:
        return []
    return [wanted for wanted in found if not wanted.marker or not _is_for_developers(wanted.marker)]


def _is_for_developers(marker: Marker) -> bool:
    return marker.evaluate({"extra": _DEVELOPERS}) and not marker.evaluate({"extra": ""})


def _against_range(wanted: Requirement, version: str) -> Finding:
    if _contains(str(wanted.specifier), version):
        return Finding(wanted.name, "ok", version)
    too_old = any(rule.operator in (">", ">=") and not _contains(str(rule), version) for rule in wanted.specifier)
    way_out = f"pip install '{wanted.name}{wanted.specifier}'"
    if too_old:
        return Finding(wanted.name, "problem", f"{version} is older than {wanted.specifier}", way_out)
    return Finding(wanted.name, "warning", f"{version} is newer than the tested {wanted.specifier}", way_out)


def _missing(wanted: Requirement) -> Finding:
    without = _DISPENSABLE.get(wanted.name)
    what = "is not installed" + (f": {without}" if without else "")
    way_out = f"pip install '{wanted.name}{wanted.specifier}'"
    return Finding(wanted.name, "warning" if without else "problem", what, way_out)


def _contains(versions: str, version: str) -> bool:
    return SpecifierSet(versions).contains(version, prereleases=True)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
