from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.families import (
    FAMILIES,
    VOCABULARY,
    adapted_model,
    base_model,
    batch_of,
    labels_of,
    unlabelled,
    with_adapters,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from colm_scale.modeling import losses as losses_module
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import decoder_blocks
from colm_scale.profiling.live_tensors import LiveBytes
from colm_scale.randomness import generator
from colm_scale.records import Batch

LENGTHS = [9, 4, 7]
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""float32 sums of at most a few thousand terms of size 1, in another order: about 1e-6 of the largest term."""
SHARES = torch.tensor([0.5, 0.2, 0.3])


def reference(model: nn.Module, batch: Batch) -> Tensor:
    """``[B]`` mean over an example's own label tokens of the cross-entropy of all logits, in float32."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.float()
    of_rows = []
    for row_logits, labels in zip(logits[:, :-1], labels_of(batch)[:, 1:]):
        counted = labels != -100
        of_rows.append(F.cross_entropy(row_logits[counted], labels[counted]))
    return torch.stack(of_rows)


def losses_of(module: ExampleLoss, batch: Batch) -> Tensor:
    return module(batch)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(losses: Tensor, model: nn.Module, shares: Tensor = SHARES) -> list[Tensor]:
    return list(torch.autograd.grad((losses * shares).sum(), trained(model)))


def assert_equals_reference(model: nn.Module, batch: Batch, tolerance=ROUNDING) -> ExampleLoss:
    expected = reference(model, batch)
    expected_gradients = gradients(expected, model)
    module = ExampleLoss(model)
    losses = losses_of(module, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, **tolerance)
    torch.testing.assert_close(gradients(losses, model), expected_gradients, **tolerance)
    assert all(g.abs().max() > 1e-4 for g in expected_gradients[-4:])  # the comparison is not of zeros
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_adapter_gradients_equal_the_plain_reference(family):
    assert_equals_reference(adapted_model(family), batch_of(LENGTHS))


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_a_head_in_chunks_equals_the_whole(monkeypatch, rows_at_once):
    monkeypatch.setattr(losses_module, "CHUNK_BYTES", 4 * VOCABULARY * rows_at_once + 5)
    calls = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, *a, **k: calls.append(len(x)) or cross_entropy(x, *a, **k))
    model, batch = adapted_model("llama"), batch_of(LENGTHS)
    losses_of(ExampleLoss(model), batch)
    tokens = sum(LENGTHS) - 2 * len(LENGTHS)
    assert sum(calls) == tokens
    assert max(calls) == rows_at_once
    assert_equals_reference(adapted_model("llama"), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_without_a_graph_losses_are_the_same_bit_for_bit(monkeypatch, family, dtype):
    monkeypatch.setattr(losses_module, "CHUNK_BYTES", 4 * VOCABULARY * 3)
    module, batch = ExampleLoss(adapted_model(family, dtype=dtype)), batch_of(LENGTHS)
    with_graph = losses_of(module, batch)
    with torch.no_grad():
        assert torch.equal(losses_of(module, batch), with_graph)
        assert losses_of(module, unlabelled(batch)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("part", [1, 7, VOCABULARY])
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_that_is_lifted_by_parts_equals_the_whole_lifted(monkeypatch, part, bias):
    """In float32: softmax over 97 logits of up to 200 in other groups."""
    drawn = generator(0, "head")
    hidden, weight = 8 * torch.randn(11, 32, generator=drawn), torch.randn(VOCABULARY, 32, generator=drawn).bfloat16()
    added = torch.randn(VOCABULARY, generator=drawn).bfloat16() if bias else None
    targets = torch.randint(VOCABULARY, (11,), generator=drawn)
    monkeypatch.setattr(losses_module, "CHUNK_BYTES", 4 * 32 * part)
    found = losses_module._cross_entropy(hidden, weight, added, targets, lambda x: 0.9 * x, chunk=2)
    whole = F.linear(hidden.double(), weight.double(), None if added is None else added.double())
    expected = F.cross_entropy(0.9 * whole, targets, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-5)


def test_a_wide_head_is_never_lifted_whole():
    """128,256 x 2,048: 1 GB in float32."""
    with FakeTensorMode():
        hidden, targets = torch.empty(4096, 2048), torch.zeros(4096, dtype=torch.int64)
        weight = torch.empty(128_256, 2048, dtype=torch.bfloat16)
        with LiveBytes([hidden, targets, weight]) as live:
            before = live.now
            losses_module._cross_entropy(hidden, weight, None, targets, lambda x: x, chunk=130)
    assert live.peak - before < 4 * losses_module.CHUNK_BYTES


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_exist_only_where_labels_are(family):
    model = adapted_model(family)
    head, rows = model.get_output_embeddings(), []
    head.register_forward_hook(lambda _module, _args, output: rows.append(output.numel() // VOCABULARY))
    losses_of(ExampleLoss(model), batch_of(LENGTHS))
    assert rows == [1]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 1.5}),
    ],
)
def test_what_a_model_does_to_its_logits_counts(family, options):
    assert_equals_reference(adapted_model(family, **options), batch_of(LENGTHS))


def test_a_model_that_does_to_its_logits_what_we_do_not_know_makes_them_itself():
    model = adapted_model("llama")
    inner = model.get_base_model()
    plain_forward = inner.forward

    def forward(*args, **kwargs):
        output = plain_forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output

    inner.forward = forward
    module = assert_equals_reference(model, batch_of(LENGTHS))
    again = losses_of(module, batch_of([6, 6]))
    torch.testing.assert_close(again, reference(model, batch_of([6, 6])), **ROUNDING)


def test_a_head_with_a_bias():
    model = base_model("phi")
    assert model.lm_head.bias is not None
    model.lm_head.bias.data.mul_(20)  # of the size of the logits
    assert_equals_reference(with_adapters(model), batch_of(LENGTHS))


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_a_head_that_is_trained(family):
    model = adapted_model(family)
    head = model.get_output_embeddings()
    head.requires_grad_(True)
    assert_equals_reference(model, batch_of(LENGTHS))


def test_a_head_with_an_adapter():
    model = with_adapters(base_model("llama"), target_modules=["v_proj", "lm_head"])
    assert_equals_reference(model, batch_of(LENGTHS))


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_an_output_embedding_tied_to_the_input(family):
    model = adapted_model(family)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_equals_reference(model, batch_of(LENGTHS))


def test_bfloat16_is_as_near_to_float32_as_the_plain_reference_is():
    model, batch = adapted_model("llama", dtype=torch.bfloat16), batch_of(LENGTHS)
    module = ExampleLoss(model)
    plain, ours = reference(model, batch), losses_of(module, batch)
    plain_gradients, our_gradients = (torch.cat([g.flatten() for g in gradients(x, model)]) for x in (plain, ours))
    exact = reference(model.float(), batch)
    exact_gradients = torch.cat([g.flatten() for g in gradients(exact, model)])
    torch.testing.assert_close(ours, exact, rtol=2**-6, atol=0)  # a few roundings to 2^-9 in sequence
    # Both round at the head and on the way down, in another order: two draws of the same error.
    assert (our_gradients - exact_gradients).norm() <= 1.5 * (plain_gradients - exact_gradients).norm()


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_a_row_without_labels_has_loss_zero_and_does_not_touch_the_others(head):
    model, batch = adapted_model("llama"), batch_of(LENGTHS)
    model.get_output_embeddings().requires_grad_(head == "trained")
    module = ExampleLoss(model)
    before = losses_of(module, batch)
    losses = losses_of(module, unlabelled(batch, 1))
    assert losses[1] == 0
    assert torch.equal(losses[[0, 2]], before[[0, 2]])  # the same rows of the same products
    assert all(g.isfinite().all() for g in gradients(losses, model))
    losses = losses_of(module, unlabelled(batch))
    assert losses.tolist() == [0, 0, 0]
    assert all((g == 0).all() for g in gradients(losses, model))


def test_a_label_at_the_first_token_carries_no_loss():
    module = ExampleLoss(adapted_model("llama"))
    before = losses_of(module, batch_of(LENGTHS, prompt=1))
    assert torch.equal(losses_of(module, batch_of(LENGTHS, prompt=0)), before)


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_zero_weight_keeps_the_graph_and_gives_zero_gradients(head):
    model = adapted_model("llama")
    model.get_output_embeddings().requires_grad_(head == "trained")
    (losses_of(ExampleLoss(model), batch_of([5, 3])) * torch.zeros(2)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in trained(model))


def test_the_model_by_itself_is_unchanged():
    model, batch = adapted_model("llama"), batch_of(LENGTHS)
    expected = model(batch.input_ids, batch.attention_mask).logits
    ExampleLoss(model)
    assert torch.equal(model(batch.input_ids, batch.attention_mask).logits, expected)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "opt"])
def test_activation_checkpointing_trains_with_the_same_gradients(family):
    model, batch = adapted_model(family), batch_of(LENGTHS)
    module = ExampleLoss(model)
    losses = losses_of(module, batch)
    expected = gradients(losses, model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    decoder_blocks(model)[1][0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = losses_of(module, batch)
    assert torch.equal(checkpointed, losses)
    # The recomputed activations are the same numbers.
    torch.testing.assert_close(gradients(checkpointed, model), expected, rtol=0, atol=0)
    assert len(calls) == 2  # forward and recomputation
