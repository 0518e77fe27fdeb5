from __future__ import annotations

import pytest
import torch
from support.families import base_model, batch_of, with_adapters
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from colm_scale.errors import UserError
from colm_scale.modeling import compiling
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import decoder_blocks

CPU = torch.device("cpu")
MORE = (("llama", False), ("phi", False), ("phi", True), ("gemma2", False))


@pytest.fixture
def counter(monkeypatch):
    """Compiles to what dynamo has traced, and counts; the same operations, so the same bits."""
    torch._dynamo.reset()
    counter, whole = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: whole(function, backend=counter, **options))
    yield counter
    torch._dynamo.reset()


def gradients(module, batch):
    losses = module(batch)
    module.zero_grad()
    losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in module.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    ("family", "packs"), [("llama", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_losses_and_gradients_of_batches_of_any_shape(family, packs, counter):
    base = base_model(family, num_hidden_layers=3)
    use_packing(base, "auto" if packs else "off", CPU)
    module = ExampleLoss(with_adapters(base))
    assert module.packs == packs
    batches = [batch_of(lengths, packed=packs) for lengths in ([9, 4, 7], [6, 5], [11, 3, 8, 2])]
    expected = [gradients(module, batch) for batch in batches]
    compiling.compile_blocks(decoder_blocks(module.causal_model)[1][:2])
    found = [gradients(module, batch) for batch in batches]
    assert counter.frame_count
    for ours, plain in zip(found, expected):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(ours, plain))


def test_nothing_is_compiled_within_uncompiled(counter):
    module = ExampleLoss(with_adapters(base_model("llama", num_hidden_layers=2)))
    compiling.compile_blocks(decoder_blocks(module.causal_model)[1])
    with compiling.uncompiled():
        module(batch_of([5, 3]))
    assert not counter.frame_count
    module(batch_of([5, 3]))
    assert counter.frame_count


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with fresh_cache(), pytest.raises(UserError, match=r"--train.compile true: torch cannot compile for cpu here \("):
        compiling.check_compiler(CPU)
