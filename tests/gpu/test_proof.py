"""What a GPU computes, waits for and holds, beside the CPU, the lists of the strict device and the plan."""

from __future__ import annotations

import pytest
import torch
from support import cases, cuda_runs, strict_runs, worker
from unit.step.test_host_reads import ALLOWED, GENERATED, ROUNDED

from colm_scale.data.batching import make_batch
from colm_scale.profiling.memory import memory_meter
from colm_scale.randomness import generator
from colm_scale.sketch.zeroth_order import PERTURBATION, directional_derivatives

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
EXACT = [name for name in strict_runs.CASES if name not in ROUNDED]
LISTED = [name for name in strict_runs.CASES if name in ALLOWED]
LOSS = 1e-5
"""Relative; sums in another order (padded rows instead of packed ones, on the CPU) change a loss by 3e-7 at most."""
GRADIENT = 1e-4
"""Relative to the norm; a float32 sum of some hundred products, through four blocks and back."""
WORKSPACE = 128 * 2**20
"""Bytes that cuBLAS takes from the allocator, which no plan knows: 32 MiB for each stream and handle on Hopper."""
BESIDE = 8 * 2**30
"""More bytes than a CUDA context, its kernels and NCCL take beside the allocator."""


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", EXACT)
def test_steps_on_a_gpu_are_those_of_the_cpu(name):
    here, there = cuda_runs.on_cpu(name), cuda_runs.on_device(name, DEVICE)
    assert there["ids"] == here["ids"]
    assert there["losses"] == pytest.approx(here["losses"], rel=LOSS)


def sketched(device: torch.device) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Losses and gradients of the probe tensor, and losses and directional derivatives, of three examples."""
    module, tap = worker.model(device=device)
    rows = [torch.randint(3, worker.VOCABULARY, (n,), generator=generator(3, "row", n)) for n in (9, 24, 17)]
    batch = make_batch(rows, [torch.arange(len(row)) > 2 for row in rows], torch.arange(3), 0, device)
    module.knows_logits()
    losses, delta, a = tap.factors(batch)
    z = torch.randn(4, cases.D, generator=generator(4, "z")).to(device)
    derived = directional_derivatives(tap, batch, z, PERTURBATION)
    return [losses.cpu(), (delta.mT @ a).cpu()], tuple(part.detach().cpu() for part in derived)


def test_sketches_on_a_gpu_are_those_of_the_cpu():
    (here, of_here), (there, of_there) = sketched(CPU), sketched(DEVICE)
    torch.testing.assert_close(there[0], here[0], rtol=LOSS, atol=0)
    assert ((there[1] - here[1]).flatten(1).norm(dim=1) <= GRADIENT * here[1].flatten(1).norm(dim=1)).all()
    torch.testing.assert_close(of_there[0], of_here[0], rtol=LOSS, atol=0)
    # Each of the two losses of a difference is rounded, and the difference is divided by twice the perturbation.
    rounding = 1e-6 * float(here[0].max()) / PERTURBATION
    torch.testing.assert_close(of_there[1], of_here[1], rtol=GRADIENT, atol=rounding)


@pytest.mark.parametrize("name", LISTED)
def test_the_host_waits_for_a_gpu_no_oftener_than_for_the_strict_device(name):
    reads = cuda_runs.on_device(name, DEVICE)["reads"]
    generated = [read for read in reads if read.phase == "generate"]
    assert {read.site for read in generated} <= {read.split()[-1] for read in GENERATED}
    others = [read for read in reads if read.phase != "generate"]
    assert cuda_runs.more_than_allowed(others, ALLOWED[name]) == []
    assert "step/train.py:finish" in {read.site for read in others}, "torch warned of nothing"


@pytest.mark.parametrize("name", ["reuse device", "reuse cpu"])
def test_a_reused_forward_trains_as_one_that_is_computed_again(name):
    reused, again = (cuda_runs.on_device(of, DEVICE) for of in (name, "checkpointed"))
    assert reused["ids"] == again["ids"]
    assert reused["losses"] == pytest.approx(again["losses"], rel=LOSS)


def test_memory_is_the_allocators_with_nvmls_beside_it_and_what_the_plan_says():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE)
    found = strict_runs.run_case(cuda_runs.LARGE, DEVICE, lambda _: None, meter_of=memory_meter)
    assert set(found["peaks"]) == {"device", "allocator"}, "NVML does not answer"
    plan = cuda_runs.planned(cuda_runs.LARGE, found)
    for phase, predicted in plan.phases.items():
        device, own = (found["peaks"][kind][phase][0] for kind in ("device", "allocator"))
        assert own <= device <= own + BESIDE, phase
        assert 0.95 * predicted <= own - before <= 1.1 * predicted + WORKSPACE, phase


@pytest.mark.parametrize("engine", cuda_runs.ENGINES)
def test_an_engine_of_one_process_trains_as_the_cpu_without_one(engine):
    """Under NCCL. One process shards nothing away, but all its collectives run."""
    if cuda_runs.missing(engine):
        pytest.skip("DeepSpeed is not installed")
    here, there = cuda_runs.on_cpu("last_layer"), cuda_runs.on_device(engine, DEVICE)
    assert torch.distributed.get_backend_config().split("cuda:")[1].startswith("nccl")
    assert there["ids"] == here["ids"]
    assert there["losses"] == pytest.approx(here["losses"], rel=LOSS)
    if engine in ALLOWED:
        assert cuda_runs.more_than_allowed(there["reads"], ALLOWED[engine]) == []
