from __future__ import annotations

import peft
import pytest
import torch
from transformers import MixtralConfig

from colm_scale.config import LoraConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.run.banner import continued_lines, kept_lines, router_lines, start_line, update_lines

NAMES = ("a", "b", "c")
SIZES = torch.tensor([10, 60, 30])
KEPT = torch.tensor([True, False, True])
NONE = torch.zeros(3, dtype=torch.int64)
SOME = torch.tensor([0, 12, 3])


def facts(protected: torch.Tensor = NONE, **options) -> list[str]:
    return kept_lines(SelectionConfig(candidates=100, **options), NAMES, SIZES, KEPT, protected)


@pytest.mark.parametrize("method", ["colm", "stratified"])
def test_kept_sources_and_protected_examples_are_named(method):
    named = "kept sources (2): a, c; 40% of the examples, and about 77% of a coreset"
    assert facts(method=method, budget=52) == [named]
    assert facts(SOME, method=method, budget=52) == [named, "protected examples: 15 (b 12, c 3)"]


def test_methods_that_keep_nothing():
    assert facts(method="random") == facts(method="full") == facts(SOME, method="full") == []
    (fact,) = facts(SOME, method="random")
    assert fact == "protected examples: 15 (b 12, c 3); --selection.method random does not protect them"


def test_too_little_room_is_told_with_the_share_that_enters():
    # On average 40 of 100 candidates are of a kept source, and 12 more are protected.
    assert len(facts(budget=40)) == 1
    kept, warning = facts(budget=30)
    assert kept.endswith("40% of the examples, and about 100% of a coreset")
    assert "about 75% of the candidates of kept sources fit" in warning
    assert "and next to none of the others:" in warning
    assert "of the others" not in facts(budget=30, coverage_floor=0.1)[-1]
    *_, warning = facts(SOME, budget=39)
    assert "about 75% of the kept and protected candidates fit" in warning


@pytest.mark.parametrize(
    ("optimizer", "method", "estimator", "probes", "warned"),
    [
        ("lion", "colm", "zeroth_order", 1, True),
        ("muon", "colm", "zeroth_order", 1, True),
        ("muon", "colm", "zeroth_order", 2, False),
        ("lion", "colm", "last_layer", 1, False),
        ("lion", "stratified", "zeroth_order", 1, False),
        ("sgd", "colm", "zeroth_order", 1, False),
    ],
)
def test_updates_that_are_nothing_but_a_sign_are_told(optimizer, method, estimator, probes, warned):
    selection = SelectionConfig(method=method, estimator=estimator, num_probes=probes)
    facts = update_lines(RunConfig(selection=selection, train=TrainConfig(optimizer=optimizer)))
    assert len(facts) == warned
    assert all(f"--train.optimizer {optimizer}" in fact and "--selection.num_probes" in fact for fact in facts)


def test_the_start_is_told_by_part():
    line = start_line({"process": 3.04, "data": 0.5, "model": 2.0})
    assert line == "started in 5.5 s: process 3.0, data 0.5, model 2.0"


@pytest.mark.parametrize("asked", [False, True])
def test_an_auxiliary_loss_that_is_left_out_is_named(asked):
    lines = router_lines(MixtralConfig(output_router_logits=asked))
    assert ["output_router_logits" in line for line in lines] == [True] * asked


def test_options_that_an_adapter_decides_are_named_if_they_differ(tmp_path):
    own = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["v_proj", "q_proj"])
    own.save_pretrained(tmp_path)
    assert continued_lines(LoraConfig(rank=4)) == continued_lines(LoraConfig(adapter=str(tmp_path))) == []
    same = LoraConfig(adapter=str(tmp_path), rank=4, alpha=8, dropout=0.1, targets=["v_proj", "q_proj"])
    assert continued_lines(same) == []
    other = LoraConfig(adapter=str(tmp_path), rank=64, dropout=0.3, targets=["q_proj"])
    assert [line.removeprefix("warning: --lora.").split(f": {tmp_path}") for line in continued_lines(other)] == [
        ["rank 64 has no effect", " goes on with its own, 4"],
        ["dropout 0.3 has no effect", " goes on with its own, 0.1"],
        ["targets ['q_proj'] has no effect", " goes on with its own, ['q_proj', 'v_proj']"],
    ]
