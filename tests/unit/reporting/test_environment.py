from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata

import torch

from colm_scale.distributed.cores import usable_cores
from colm_scale.reporting import environment as module
from colm_scale.reporting.environment import _commit, environment

CPU = torch.device("cpu")


def test_versions_devices_and_what_was_given():
    found = environment(CPU, 2, "deepspeed", base_model="tiny")
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["python"] == platform.python_version()
    named = {"python", "torch", "transformers", "peft", "deepspeed", "colm_scale", "numpy", "cuda", "nccl", "driver"}
    assert set(found["versions"]) == named
    assert [set(device) for device in found["devices"]] == [{"name", "memory_bytes"}]
    assert (found["world_size"], found["engine"], found["base_model"]) == (2, "deepspeed", "tiny")
    assert (found["cores"], found["threads"]) == (usable_cores(), torch.get_num_threads())


def test_neither_host_name_nor_variables_nor_folders_are_written(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret-of-the-user")
    monkeypatch.setattr(platform, "node", lambda: "host-of-the-user")
    monkeypatch.setattr(sys, "argv", ["/home/user-name/bin/colm-scale", "train", "--train.steps", "3"])
    written = json.dumps(environment(CPU, 1, "single"))
    assert not any(word in written for word in ("hf_secret", "host-of-the-user", "user-name"))
    assert json.loads(written)["command"] == ["colm-scale", "train", "--train.steps", "3"]


def test_the_commit_and_whether_the_checkout_differs(tmp_path):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    file = tmp_path / "package" / "module.py"
    file.parent.mkdir()
    file.write_text("a = 1\n")
    assert _commit(file) is None
    git("init")
    assert _commit(file) is None  # below somebody's repository, but no part of it
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    (tmp_path / "notes").write_text("not tracked")
    assert _commit(file) == {"id": head, "dirty": False}
    file.write_text("a = 2\n")
    assert _commit(file) == {"id": head, "dirty": True}


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment(CPU, 1, "single")["commit"] is None


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(module, "_PACKAGES", ("no-such-package",))
    assert environment(CPU, 1, "single")["versions"]["no-such-package"] is None
