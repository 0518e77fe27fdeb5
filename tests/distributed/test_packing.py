"""Packed micro-batches train what padded ones do, under every engine."""

from __future__ import annotations

import pytest
import torch

PAIRS = [(engine, case) for engine in ("auto", "fsdp", "zero2", "zero3") for case in ("last_layer", "padded")]
CASES = ("last_layer", "padded")


def test_padding_is_what_differs(alone):
    assert all(step["padding"] == {"sketch": 0, "train": 0} for step in alone["last_layer"]["steps"])
    assert any(step["padding"]["train"] > 0.05 for step in alone["padded"]["steps"])


@pytest.mark.parametrize("engine", ["auto", "fsdp", "zero2", "zero3"])
def test_ids_losses_and_norms_are_those_of_padded_micro_batches(ranks, engine):
    for cases in ranks:
        assert_alike(cases[f"{engine}/last_layer"]["steps"], cases[f"{engine}/padded"]["steps"])


def test_so_they_are_on_one_process(alone):
    assert_alike(alone["last_layer"]["steps"], alone["padded"]["steps"])


def assert_alike(packed, padded):
    first, other = packed[0], padded[0]
    assert first["ids"].tolist() == other["ids"].tolist()
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert first["norm"] == pytest.approx(other["norm"], rel=1e-4)
    # Adam's first updates divide rounding by little: later steps are alike while they train the same examples.
    for step, counterpart in zip(packed, padded):
        if not torch.equal(step["ids"], counterpart["ids"]):
            break
        assert step["loss"] == pytest.approx(counterpart["loss"], rel=1e-3)
