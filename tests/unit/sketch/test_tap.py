from __future__ import annotations

import copy
import functools
import itertools
import random

import numpy
import pytest
import torch
from support.families import (
    BLOCKS,
    FAMILIES,
    PROBES,
    ROWS,
    adapted_model,
    base_model,
    batch_of,
    part_of,
    with_adapters,
)

from colm_scale.errors import UserError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import Probe, find_probe
from colm_scale.profiling.live_tensors import LiveBytes
from colm_scale.randomness import generator
from colm_scale.sketch.tap import Tap

LENGTHS = [9, 5, 7]
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""float32 sums of at most a few thousand terms of size 1, in another order: about 1e-6 of the largest term."""


def probe_of(family: str) -> Probe:
    return Probe(BLOCKS[family], PROBES[family], torch.tensor(ROWS[family]))


def tap_of(family: str, **options) -> Tap:
    return Tap(ExampleLoss(adapted_model(family, **options)), probe_of(family))


def changes_of(tap: Tap, branches: int) -> torch.Tensor:
    return 0.3 * torch.randn(branches, tap.size, generator=generator(0, "changes"))


def example_gradients(tap: Tap, batch) -> torch.Tensor:
    """``[B, d_out, r]`` by one backward pass per example to the weight itself."""
    with torch.enable_grad():
        tap.model.eval()
        rows = []
        for row in range(len(batch.positions)):
            loss = tap.model(part_of(batch, row)).sum()
            rows.append(torch.autograd.grad(loss, tap.lora_b.weight)[0])
    return torch.stack(rows)[:, tap.rows]


@functools.cache
def found_probe(family: str, role: str) -> Probe:
    return find_probe(base_model(family), role)


ROLES = ("v", "q", "k", "o", "mlp")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_factors_of_every_role_multiply_to_each_examples_gradient(family, role):
    tap, batch = Tap(ExampleLoss(adapted_model(family)), found_probe(family, role)), batch_of(LENGTHS, width=11)
    losses, delta, a = tap.factors(batch)
    torch.testing.assert_close(losses, tap.bare_losses(batch), **ROUNDING)
    expected = example_gradients(tap, batch)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(delta.transpose(1, 2) @ a, expected, **ROUNDING)
    assert not delta[1, 5:].any()
    assert not delta[2, 7:].any()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_equal_a_changed_weight_in_every_role(family, role):
    tap, batch = Tap(ExampleLoss(adapted_model(family)), found_probe(family, role)), batch_of(LENGTHS)
    changes = changes_of(tap, 3)
    changes[2] = 0
    losses = tap.branched_losses(batch, changes)
    before = copy.deepcopy(tap.model.state_dict())
    for change, of_branch in zip(changes, losses):
        tap.lora_b.weight.data[tap.rows] += change.view(tap.shape)
        torch.testing.assert_close(of_branch, tap.bare_losses(batch), **ROUNDING)
        tap.model.load_state_dict(before)
    for one, other in itertools.combinations(range(3), 2):
        assert (losses[one] - losses[other]).abs().max() > 1e-3  # each change is felt


def test_a_probe_that_is_a_part_of_a_fused_layer():
    tap = Tap(ExampleLoss(adapted_model("phi3")), found_probe("phi3", "q"))
    assert (tap.shape, tap.size) == ((32, 4), 128)
    assert tap.lora_b.out_features > 32
    assert tap.block is tap.model.causal_model.model.layers[1]


def test_blocks_below_the_last_run_once_per_example():
    tap = tap_of("llama")
    seen: list[tuple[int, int]] = []
    for number, block in enumerate(tap.model.causal_model.model.layers):
        block.register_forward_hook(lambda _block, args, _out, number=number: seen.append((number, len(args[0]))))
    tap.branched_losses(batch_of(LENGTHS), changes_of(tap, 5))
    assert seen == [(0, 3), (1, 6), (1, 6), (1, 3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_do_not_depend_on_those_that_run_before_them(family):
    """Bit for bit: a difference is computed in the same shapes whatever the number of probes."""
    tap, batch = tap_of(family), batch_of(LENGTHS)
    changes = changes_of(tap, 6)
    found = tap.branched_losses(batch, changes)
    for start in (0, 2, 4):
        assert torch.equal(found[start : start + 2], tap.branched_losses(batch, changes[start : start + 2]))


def test_memory_does_not_grow_with_the_branches():
    tap, batch = tap_of("llama"), batch_of([40] * 6)
    tap.bare_losses(batch)  # the first forward looks at the logits
    peaks = []
    for branches in (2, 8, 32):
        changes = changes_of(tap, branches)
        with LiveBytes([*tap.model.parameters(), *tap.model.buffers(), changes]) as live:
            before = live.now
            tap.branched_losses(batch, changes)
        peaks.append(live.peak - before)
    kept = 6 * 40 * (32 + 2 * 8) * 4  # the last block's input, and its angles
    assert peaks[0] <= peaks[1] <= peaks[0] + kept + 2**14
    assert peaks[2] - peaks[1] < 2**12  # of four bytes a loss


def test_a_forward_that_fails_leaves_all_blocks():
    tap, calls = tap_of("llama"), []

    def fail(*_):
        calls.append(len(tap.blocks))
        if len(calls) == 2:
            raise RuntimeError("within a block")

    tap.block.mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="within a block"):
        tap.branched_losses(batch_of(LENGTHS), changes_of(tap, 4))
    assert calls == [2, 1]
    assert len(tap.blocks) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_equal_a_changed_weight(family):
    tap, batch = tap_of(family), batch_of(LENGTHS)
    changes = changes_of(tap, 4)
    changes[3] = 0
    losses = tap.branched_losses(batch, changes)
    weight = copy.deepcopy(tap.lora_b.weight.data)
    for change, of_branch in zip(changes, losses):
        tap.lora_b.weight.data[tap.rows] += change.view(tap.shape)
        torch.testing.assert_close(of_branch, tap.bare_losses(batch), **ROUNDING)
        tap.lora_b.weight.data.copy_(weight)
    assert (losses[0] - losses[3]).abs().min() > 1e-3  # the change is felt: the comparison is not of constants


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_multiply_to_each_examples_gradient(family):
    tap, batch = tap_of(family), batch_of(LENGTHS)
    losses, delta, a = tap.factors(batch)
    torch.testing.assert_close(losses, tap.bare_losses(batch), **ROUNDING)
    torch.testing.assert_close(delta.transpose(1, 2) @ a, example_gradients(tap, batch), **ROUNDING)
    assert delta.shape == (3, 9, tap.shape[0])
    assert a.shape == (3, 9, tap.shape[1])
    assert not delta[1, 5:].any()
    assert not delta[2, 7:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_finite_differences_of_branches_approach_the_exact_derivative(family):
    tap, batch = tap_of(family), batch_of(LENGTHS)
    z, eps = changes_of(tap, 1)[0], 1e-2
    plus, minus = tap.branched_losses(batch, torch.stack([eps * z, -eps * z]))
    _, delta, a = tap.factors(batch)
    exact = (delta.transpose(1, 2) @ a).flatten(1) @ z
    # Losses of about 5 are rounded to 5e-7, divided by 2 eps: 3e-5. The third derivative leaves eps^2 = 1e-4 relative.
    torch.testing.assert_close((plus - minus) / (2 * eps), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_bfloat16_blocks_with_float32_adapters(family):
    tap, batch = tap_of(family, dtype=torch.bfloat16), batch_of(LENGTHS)
    _, delta, a = tap.factors(batch)
    assert tap.lora_b.weight.dtype == delta.dtype == a.dtype == torch.float32
    product, exact = delta.transpose(1, 2) @ a, example_gradients(tap, batch)
    # The activations of an example alone and of one in a padded batch are rounded to 8 bits along other paths, about
    # twenty roundings deep: sqrt(20) * 2^-8 = 2 % of the gradient's norm.
    assert ((product - exact).flatten(1).norm(dim=1) <= 0.04 * exact.flatten(1).norm(dim=1)).all()


def test_without_padding_bfloat16_factors_differ_by_rounding_of_the_last_product_only():
    tap, batch = tap_of("llama", dtype=torch.bfloat16), part_of(batch_of([8]), 0)
    _, delta, a = tap.factors(batch)
    # The same kernels on the same shapes: delta and a are equal to the last bit, the product is float32.
    torch.testing.assert_close(delta.transpose(1, 2) @ a, example_gradients(tap, batch), **ROUNDING)


@pytest.mark.parametrize("lengths", [[6] * 6, [6, 4, 6, 6, 5, 6], [3, 3, 3], [1, 1], [7] * 7], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "opt", "bloom"])
def test_a_micro_batch_as_large_as_it_is_long(family, lengths):
    tap, batch = tap_of(family), batch_of(lengths, prompt=1)
    changes = changes_of(tap, 2)
    losses = tap.branched_losses(batch, changes)
    alone = [tap.branched_losses(part_of(batch, row), changes) for row in range(len(lengths))]
    torch.testing.assert_close(losses, torch.cat(alone, dim=1), **ROUNDING)


def test_what_only_happens_to_be_as_long_as_the_micro_batch_is_not_repeated():
    model = adapted_model("llama")
    block = model.get_base_model().model.layers[1]
    seen, forward = [], block.forward

    def with_table(_block, args, kwargs):
        return args, {**kwargs, "table": torch.zeros(args[0].shape[1], 2)}

    def watch(*args, table, **kwargs):
        seen.append((len(args[0]), len(table)))
        return forward(*args, **kwargs)

    block.register_forward_pre_hook(with_table, with_kwargs=True)
    block.forward = watch
    tap = Tap(ExampleLoss(model), probe_of("llama"))
    tap.branched_losses(batch_of([6] * 6), changes_of(tap, 2))
    assert seen[-1] == (12, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_companions_do_not_change_a_row(family):
    tap, batch = tap_of(family), batch_of(LENGTHS, width=12)
    changes = changes_of(tap, 2)
    together, (_, delta, a) = tap.branched_losses(batch, changes), tap.factors(batch)
    for row, length in enumerate(LENGTHS):
        one = part_of(batch, row)
        torch.testing.assert_close(tap.branched_losses(one, changes)[:, 0], together[:, row], **ROUNDING)
        _, one_delta, one_a = tap.factors(one)
        torch.testing.assert_close(one_delta[0], delta[row, :length], **ROUNDING)
        torch.testing.assert_close(one_a[0], a[row, :length], **ROUNDING)


def observed(model) -> tuple:
    """Everything that a sketch must leave alone."""
    return (
        [tensor.clone() for tensor in model.state_dict().values()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [module.training for module in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize(("family", "options"), [("llama", {"attention_dropout": 0.5}), ("opt", {"dropout": 0.5})])
def test_a_sketch_leaves_no_trace_and_does_not_drop(family, options):
    model = ExampleLoss(adapted_model(family, lora_dropout=0.5, **options))
    model.model.get_base_model().get_submodule("lm_head").eval()  # modes that differ between modules come back too
    weights, *rest = observed(model)
    states = torch.get_rng_state(), str(numpy.random.get_state()), random.getstate()
    tap, batch = Tap(model, probe_of(family)), batch_of(LENGTHS)
    first = [tap.branched_losses(batch, changes_of(tap, 2)), *tap.factors(batch), tap.bare_losses(batch)]
    again = [tap.branched_losses(batch, changes_of(tap, 2)), *tap.factors(batch), tap.bare_losses(batch)]
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(numpy.random.get_state()), random.getstate()) == states[1:]
    weights_after, *rest_after = observed(model)
    assert rest == rest_after
    assert all(torch.equal(x, y) for x, y in zip(weights, weights_after))


def test_the_hooks_go_even_when_the_forward_fails():
    tap = tap_of("llama")
    hooks = observed(tap.model)[3:]
    broken = batch_of([4])
    broken.input_ids.fill_(10_000)
    for sketch in (lambda: tap.factors(broken), lambda: tap.branched_losses(broken, changes_of(tap, 2))):
        with pytest.raises(IndexError):
            sketch()
        assert observed(tap.model)[3:] == hooks


def test_checkpointed_blocks_are_sketched_alike():
    tap, batch = tap_of("llama"), batch_of(LENGTHS)
    changes = changes_of(tap, 2)
    before = tap.branched_losses(batch, changes), tap.factors(batch)
    tap.model.model.enable_input_require_grads()
    tap.model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(tap.branched_losses(batch, changes), before[0])
    assert all(torch.equal(x, y) for x, y in zip(tap.factors(batch), before[1]))


def test_dora_is_refused():
    model = ExampleLoss(with_adapters(base_model("llama"), use_dora=True))
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.v_proj is not plain LoRA but Dora"):
        Tap(model, probe_of("llama"))


def test_a_probe_without_an_adapter_is_refused():
    model = ExampleLoss(with_adapters(base_model("llama"), target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj has no LoRA adapter.*lora\.targets"):
        Tap(model, probe_of("llama"))
