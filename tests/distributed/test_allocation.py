"""What the training pass tells about sources decides how many of each are trained on: the same on any number of ranks,
under any engine, and after a restart."""

from __future__ import annotations

import pytest
import torch
from support import worker
from support.worker import PAD

from colm_scale.data.batching import collate
from colm_scale.sketch.observe import PROJECTED

CASES = ("neyman", "agreement", "agreement_broken", "excess_loss")
PAIRS = [
    ("auto", "neyman"),
    ("auto", "agreement_broken"),
    ("auto", "excess_loss"),
    ("zero3", "neyman"),
    ("fsdp", "neyman"),
]
SOURCES = len(worker.SIZES)


def quotas(step: dict) -> list[int]:
    data = worker.examples()
    return torch.bincount(data.sources[step["indices"][step["positions"]]], minlength=SOURCES).tolist()


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_ids_are_those_of_one_rank(ranks, alone, engine, case):
    for rank in ranks:
        for own, expected in zip(rank[f"{engine}/{case}"]["steps"], alone[case]["steps"], strict=True):
            assert own["ids"].tolist() == expected["ids"].tolist()


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_all_ranks_know_the_same_and_what_one_rank_knows(ranks, alone, engine, case):
    """Micro-batches differ with the number of ranks, and with them the last bits of gradients and, slowly, weights."""
    known = [rank[f"{engine}/{case}"]["steps"][-1]["statistics"] for rank in ranks]
    assert torch.equal(*known)
    expected = alone[case]["steps"][-1]["statistics"]
    torch.testing.assert_close(known[0], expected, rtol=1e-4, atol=1e-4 * float(expected[:, 1:].abs().max()))


def test_a_run_that_is_broken_off_goes_on_as_if_it_had_not_been(alone):
    for own, expected in zip(alone["agreement_broken"]["steps"], alone["agreement"]["steps"], strict=True):
        assert own["ids"].tolist() == expected["ids"].tolist()
        assert torch.equal(own["statistics"], expected["statistics"])


@pytest.mark.parametrize("case", ["neyman", "agreement"])
def test_the_first_step_shows_each_trained_examples_gradient(alone, case):
    """Neyman's is checkpointed: it runs each block twice, and still counts each example once."""
    step = alone[case]["steps"][0]
    module, tap = worker.model()
    data = worker.examples()
    expected = torch.zeros(SOURCES, 3, dtype=torch.float64)
    for position in step["positions"]:
        index = step["indices"][position]
        batch = collate(data, index.view(1), position.view(1), PAD, torch.device("cpu"))
        loss = module(batch.input_ids, batch.attention_mask, batch.labels).sum()
        (gradient,) = torch.autograd.grad(loss, tap.probes[0].lora_b.weight)
        expected[data.sources[index]] += torch.tensor([1, loss.item(), gradient.square().sum().item()])
    assert expected[:, 0].sum() == 12
    torch.testing.assert_close(step["statistics"][:, :3], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_what_is_learned_moves_examples(alone, case):
    """Every source with candidates gets its one, and who gets more changes."""
    data = worker.examples()
    for step in alone[case]["steps"]:
        present = torch.bincount(data.sources[step["indices"]], minlength=SOURCES)
        found = quotas(step)
        assert sum(found) == 12
        assert all(min(1, there) <= quota <= there for quota, there in zip(found, present.tolist()))
    assert len({tuple(quotas(step)) for step in alone[case]["steps"]}) > 1


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_gradients_cost_one_reduction_of_fixed_size(ranks, alone, engine, case):
    bytes_of = {step["bytes"].get("sources", 0) for step in ranks[0][f"{engine}/{case}"]["steps"]}
    assert bytes_of == {0 if case == "excess_loss" else 8 * SOURCES * (1 + PROJECTED)}
    assert not any(step["bytes"] for step in alone[case]["steps"])
