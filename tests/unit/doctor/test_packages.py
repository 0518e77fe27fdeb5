"""Known-bad versions and ranges, on versions that are given."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from colm_scale.doctor import packages
from colm_scale.doctor.packages import KNOWN_BAD, against_ranges, check_packages, known_bad

GOOD = {"deepspeed": "0.19.8", "accelerate": "1.15.0", "peft": "0.21.2", "transformers": "5.23.0"}
REQUIRED = [Requirement(line) for line in ("peft<0.22,>=0.19", "deepspeed>=0.19.8", 'jinja2>=3.1; extra == "report"')]


@pytest.mark.parametrize(
    ("change", "package", "status", "link"),
    [
        ({"deepspeed": "0.19.2"}, "deepspeed", "problem", "DeepSpeed/pull/8148"),
        ({"accelerate": "1.14.0"}, "accelerate", "warning", "accelerate/pull/4206"),
        ({"pynvml": "12.0.0"}, "pynvml", "warning", "issues/1699"),
    ],
)
def test_each_known_bad_version_is_named_with_reason_way_out_and_link(change, package, status, link):
    (found,) = known_bad(GOOD | change)
    assert found.about == f"{package} {change[package]}"
    assert found.status == status
    assert link in found.link
    assert found.what
    assert found.way_out


def test_good_versions_are_not_named():
    assert known_bad(GOOD) == []


def test_a_combination_needs_all_its_parts():
    assert known_bad({"accelerate": "1.14.0", "transformers": "5.23.0"}) == []


def test_every_row_of_the_table_has_a_public_link():
    assert len(KNOWN_BAD) >= 4
    assert all(bad.link.startswith("https://") for bad in KNOWN_BAD)


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [("0.18.1", "problem", "older"), ("0.21.2", "ok", "0.21.2"), ("0.22.0", "warning", "newer than the tested")],
)
def test_a_package_is_held_against_its_range(version, status, words):
    found = against_ranges(REQUIRED, GOOD | {"peft": version})
    assert [(finding.about, finding.status) for finding in found] == [("peft", status), ("deepspeed", "ok")]
    assert words in found[0].what


def test_without_deepspeed_much_works_and_without_peft_nothing():
    found = against_ranges(REQUIRED, {"jinja2": "3.1.6"})
    assert [(finding.about, finding.status) for finding in found] == [
        ("peft", "problem"),
        ("deepspeed", "warning"),
        ("jinja2", "ok"),
    ]
    assert "DDP and FSDP2 do not" in found[1].what


def test_what_is_installed_here_is_within_its_ranges(monkeypatch):
    assert {finding.status for finding in check_packages()} == {"ok"}
    monkeypatch.setattr(packages, "installed_versions", lambda: {"torch": "2.9.0"})
    assert [finding.status for finding in check_packages() if finding.about == "torch"] == ["problem"]


def test_the_tools_of_developers_are_none_of_a_user_s_business(monkeypatch):
    lines = ["peft>=0.19", 'ruff>=0.17; extra == "dev"', 'scipy>=1.14; extra == "sources"']
    monkeypatch.setattr(packages.metadata, "requires", lambda _: lines)
    monkeypatch.setattr(packages, "installed_versions", lambda: {"peft": "0.21", "ruff": "0.17", "scipy": "1.14"})
    assert [finding.about for finding in check_packages()][1:] == ["peft", "scipy"]
