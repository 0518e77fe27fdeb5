"""The run on a GPU: what can be checked without one."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path

import torch
from support import cuda_runs, strict_runs
from support.strict_device import Read

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def test_the_wheels_to_carry_have_the_versions_of_the_constraints():
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "wheels"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wanted = {word for word in said.split() if "==" in word}
    assert wanted <= set((ROOT / "constraints.txt").read_text("utf-8").split())
    assert {"deepspeed", "datasets", "jsonargparse", "pydantic_core"} <= {word.split("==")[0] for word in wanted}


def test_torch_s_warnings_become_reads_of_their_phase():
    with cuda_runs.waits(CPU) as (entered, reads):
        entered("sketch")
        warnings.warn(f"{cuda_runs.WAITED} (Triggered internally)", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [(read.phase, read.where.split(":")[0]) for read in reads] == [("sketch", __file__)]


def test_reads_beyond_the_lists_are_named():
    fine, other = (Read("select", "wait", f"selection/{name}.py:pick", f"{name}.py:7") for name in ("one", "other"))
    allowed = {"select": ["copy to host selection/one.py:pick"]}
    assert cuda_runs.more_than_allowed([fine], allowed) == []
    assert cuda_runs.more_than_allowed([fine, other], allowed) == ["select selection/other.py:pick other.py:7"]
    assert len(cuda_runs.more_than_allowed([fine, fine], allowed)) == 2


def test_ddp_of_one_process_trains_as_one_without_it():
    alone = strict_runs.run_case(strict_runs.CASES["last_layer"], CPU, lambda _: None)
    found = strict_runs.run_case(strict_runs.CASES["last_layer"], CPU, lambda _: None, "auto", cuda_runs.ddp_of_one)
    torch.distributed.destroy_process_group()
    assert (found["ids"], found["losses"]) == (alone["ids"], alone["losses"])
