"""Packages: what this one was made for, and what is known not to work."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from colm_scale.doctor.finding import Finding, Status

_ITSELF = "colm_scale"
_DEVELOPERS = "dev"
"""The extra with the tools of those who work on the package itself: of no use to a run."""
_DISPENSABLE = {"deepspeed": "only --ds_config needs it; DDP and FSDP2 do not"}
"""Required packages without which much works, and what."""


@dataclass(frozen=True, slots=True)
class KnownBad:
    """Versions that are known to go wrong.

    Attributes:
        package: As it is called in the registry.
        versions: Which; "" for all.
        reason: What goes wrong.
        together_with: Other packages, and which of their versions it takes.
    """

    package: str
    versions: str
    status: Status
    reason: str
    way_out: str
    link: str
    together_with: tuple[tuple[str, str], ...] = ()

    def holds(self, installed: Mapping[str, str]) -> bool:
        """Whether these versions are installed."""
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
        "it does not run on CPUs with gloo",
        "pip install 'deepspeed>=0.19.8'",
        "https://github.com/deepspeedai/DeepSpeed/issues/5313",
    ),
    KnownBad(
        "accelerate",
        "<1.15",
        "warning",
        "transformers' Trainer under FSDP2 with full state dicts saves only rank 0's shard of an adapter (this "
        "package's own training collects all shards)",
        "pip install 'accelerate>=1.15'",
        "https://github.com/huggingface/accelerate/pull/4206",
        (("peft", ""), ("transformers", "")),
    ),
    KnownBad(
        "pynvml",
        "",
        "warning",
        "the package pynvml is deprecated and writes over the module of nvidia-ml-py",
        "pip uninstall pynvml, then pip install --force-reinstall nvidia-ml-py",
        "https://github.com/intelligent-machine-learning/dlrover/issues/1699",
    ),
)
"""Each was looked up: the link says what went wrong, or mended it."""


def check_versions() -> list[Finding]:
    """Every required package, the optional ones that are there, and what is known to be bad."""
    installed = installed_versions()
    return [_python(), *against_ranges(_requirements(), installed), *known_bad(installed)]


def installed_versions() -> dict[str, str]:
    """Version of every installed package, by its name in lower case with dashes."""
    found = ((item.metadata["Name"], item.version) for item in metadata.distributions())
    return {_plain(name): version for name, version in found if name}


def against_ranges(requirements: list[Requirement], installed: Mapping[str, str]) -> list[Finding]:
    """Required and optional packages against the ranges they were tested in; of the optional ones those that are
    there, each once."""
    found: dict[str, Finding] = {}
    for wanted in requirements:
        name, optional = _plain(wanted.name), wanted.marker is not None
        version = installed.get(name)
        if version is not None:
            found[name] = _against_range(wanted, version)
        elif not optional:
            found[name] = _missing(wanted)
    return list(found.values())


def known_bad(installed: Mapping[str, str]) -> list[Finding]:
    """What of `KNOWN_BAD` is installed."""
    return [
        Finding(f"{bad.package} {installed[_plain(bad.package)]}", bad.status, bad.reason, bad.way_out, bad.link)
        for bad in KNOWN_BAD
        if bad.holds(installed)
    ]


def _python() -> Finding:
    version = platform.python_version()
    if Version(version) < Version("3.11"):
        return Finding("python", "problem", version, "use Python 3.11 or newer")
    return Finding("python", "ok", version)


def _requirements() -> list[Requirement]:
    """What runs of this package use; none where it runs from a checkout that was never installed."""
    try:
        found = [Requirement(line) for line in metadata.requires(_ITSELF) or ()]
    except metadata.PackageNotFoundError:
        return []
    return [wanted for wanted in found if not _is_of_extra(wanted, _DEVELOPERS)]


def _is_of_extra(wanted: Requirement, extra: str) -> bool:
    marker = wanted.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _against_range(wanted: Requirement, version: str) -> Finding:
    if _contains(str(wanted.specifier), version):
        return Finding(wanted.name, "ok", version)
    too_old = any(rule.operator in (">", ">=") and not _contains(str(rule), version) for rule in wanted.specifier)
    way_out = f"pip install '{wanted.name}{wanted.specifier}'"
    if too_old:
        return Finding(wanted.name, "problem", f"{version} is older than {wanted.specifier}", way_out)
    return Finding(wanted.name, "warning", f"{version} is newer than what was tested ({wanted.specifier})", way_out)


def _missing(wanted: Requirement) -> Finding:
    without = _DISPENSABLE.get(wanted.name)
    what = "is not installed" + (f": {without}" if without else "")
    way_out = f"pip install '{wanted.name}{wanted.specifier}'"
    return Finding(wanted.name, "warning" if without else "problem", what, way_out)


def _contains(versions: str, version: str) -> bool:
    return SpecifierSet(versions).contains(version, prereleases=True)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
