"""What only a GPU can show. `benchmarks/gpu.sh` runs those that are not marked slow, which start whole runs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.families import base_model, batch_of, with_adapters

from colm_scale.modeling.attention import PACKED, PACKED_SDPA
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import Tried, use_packing
from colm_scale.modeling.probe import find_probe
from colm_scale.randomness import generator
from colm_scale.records import Batch
from colm_scale.selection.ranking.facility import greedy_with_gains
from colm_scale.selection.ranking.similarity import similarities
from colm_scale.sketch.tap import Tap

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The same short run on the GPU and on the CPU."""
    out = tmp_path_factory.mktemp("runs")
    options = ["--train.steps", "3", "--eval.every", "0", "--eval.generate", "0", "--profile.floor_every", "3"]
    for name, hidden in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        command = [sys.executable, str(ROOT / "launchers" / "train.py"), *options, "--output_dir", str(out / name)]
        subprocess.run(command, check=True, env={**os.environ, **hidden})
    return {name: out / name for name in ("gpu", "cpu")}


def rows(run: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (run / file).open()]


@pytest.mark.slow
def test_the_first_step_selects_what_the_cpu_selects(runs):
    gpu, cpu = (rows(runs[name], "selection.jsonl")[0] for name in ("gpu", "cpu"))
    assert gpu["candidates"] == cpu["candidates"]
    # At the first step every update is +-1 up to rounding, and ties are decided by it: most picks agree, not all.
    assert len(set(gpu["selected"]) & set(cpu["selected"])) >= len(cpu["selected"]) * 3 // 4


@pytest.mark.slow
def test_losses_agree_with_the_cpu(runs):
    gpu, cpu = (rows(runs[name], "evaluations.jsonl")[0] for name in ("gpu", "cpu"))
    assert gpu["loss_by_source"] == pytest.approx(cpu["loss_by_source"], rel=1e-3)  # TF32 may be on


@pytest.mark.slow
def test_memory_is_the_allocators_and_nvmls(runs):
    row = rows(runs["gpu"], "metrics.jsonl")[-1]
    assert set(row["phase_peak_bytes"]) == {"device", "allocator"}
    assert row["phase_peak_bytes"]["allocator"]["train"][0] > 3_000_000, "the model alone"
    assert row["measured_over_floor"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3", "zero3_offload"])
def test_engines_train_on_a_gpu_and_go_on(tmp_path, engine, dtype):
    """One rank is enough for every engine: the first step selects what one process without an engine does."""
    script = str(ROOT / "launchers" / "train.py")
    small = ["--train.steps", "4", "--eval.every", "0", "--eval.generate", "0"]
    small += ["--checkpoint.every", "2", "--train.dtype", dtype]
    sharded = ["--engine", "fsdp"] if engine == "fsdp" else ["--ds_config", str(ROOT / f"ds_configs/{engine}.json")]
    for name, options in (("alone", []), ("engine", sharded)):
        subprocess.run([sys.executable, script, *small, *options, "--output_dir", str(tmp_path / name)], check=True)
    first = [rows(tmp_path / name, "selection.jsonl")[0]["selected"] for name in ("alone", "engine")]
    assert first[0] == first[1]
    assert all(row["loss"] > 0 for row in rows(tmp_path / "engine", "metrics.jsonl"))
    command = [sys.executable, script, *small, *sharded, "--output_dir", str(tmp_path / "engine"), "--resume", "auto"]
    subprocess.run(command, check=True)


@pytest.mark.slow
def test_a_base_in_4_bits_trains_on_a_gpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    options = ["--train.steps", "3", "--eval.every", "0", "--eval.generate", "0"]
    options += ["--train.dtype", "bfloat16", "--model.quantize", "nf4"]
    command = [sys.executable, str(ROOT / "launchers" / "train.py"), *options, "--output_dir", str(tmp_path / "run")]
    subprocess.run(command, check=True)
    assert rows(tmp_path / "run", "metrics.jsonl")[-1]["loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "fsdp", "zero3"])
def test_sketches_of_the_gpu_are_kept_on_the_cpu_and_used_again(tmp_path, engine):
    options = ["--train.steps", "3", "--eval.every", "0", "--eval.generate", "0"]
    options += ["--train.dtype", "bfloat16", "--train.seed", "1"]
    options += ["--selection.estimator", "zeroth_order", "--selection.reuse", "9"]
    if engine != "single":
        sharded = {"fsdp": ["--engine", "fsdp"], "zero3": ["--ds_config", str(ROOT / "ds_configs/zero3.json")]}
        options += sharded[engine]
    script = str(ROOT / "launchers" / "train.py")
    subprocess.run([sys.executable, script, *options, "--output_dir", str(tmp_path)], check=True)
    assert len(rows(tmp_path, "metrics.jsonl")) == 3


@pytest.mark.parametrize("n", [100, 1000])
def test_greedy_on_the_gpu_picks_what_it_picks_on_the_cpu(n):
    drawn = torch.randint(0, 99, (n, 3), generator=generator(0, "test rows", n)).double()
    for candidates in (drawn, drawn.sqrt()):
        similarity = similarities(candidates, "l1")
        on_gpu, on_cpu = (greedy_with_gains(of, n // 2) for of in (similarity.cuda(), similarity))
        assert on_gpu[0].tolist() == on_cpu[0].tolist()
        assert on_gpu[1].tolist() == on_cpu[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "stablelm", "gpt2"])
@pytest.mark.parametrize("kernel", [PACKED, PACKED_SDPA])
def test_packed_examples_have_the_losses_of_padded_ones(kernel, family, dtype):
    """`PACKED` in half precision is torch's flash kernel for sequences of any lengths, which only a GPU has."""
    device = torch.device("cuda", 0)
    model = base_model(family, dtype).to(device)
    lengths = [9, 4, 7]
    with torch.no_grad():
        expected = ExampleLoss(model)(to(batch_of(lengths), device))
        assert use_packing(model, "on", device) == Tried()
        assert model.config._attn_implementation == PACKED
        model.config._attn_implementation = kernel
        found = ExampleLoss(model)(to(batch_of(lengths, packed=True), device))
    torch.testing.assert_close(found, expected, rtol=1e-3 if dtype == torch.float32 else 0.02, atol=0)


def to(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors there; its positions stay."""

    def moved(record):
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        tensors = {name: x for name, x in fields.items() if isinstance(x, torch.Tensor) and name != "positions"}
        return dataclasses.replace(record, **{name: x.to(device) for name, x in tensors.items()})

    packing = None if batch.packing is None else moved(batch.packing)
    return dataclasses.replace(moved(batch), targets=moved(batch.targets), packing=packing)


def test_a_micro_batch_asks_the_device_for_nothing():
    """Whatever asks would make the host wait for it: only indices are worth that, between sketch and training."""
    device = torch.device("cuda", 0)
    base = base_model("llama", torch.bfloat16).to(device)
    use_packing(base, "on", device)
    probe = find_probe(base)
    tap = Tap(ExampleLoss(with_adapters(base).to(device)), probe)
    batch = to(batch_of([9, 4, 7], packed=True), device)
    tap.model(batch)  # looks at the logits, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        tap.factors(batch)
        tap.model(batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
