from __future__ import annotations

from functools import partial

import pytest
import torch
from support.families import FAMILIES, adapted_model, base_model, batch_of, some_of, with_adapters
from support.zoo import ZOO
from torch.utils.checkpoint import checkpoint

from colm_scale.modeling.forward_reuse import HeldBlockInputs, dropout_of
from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import decoder_blocks
from colm_scale.records import Batch

CPU = torch.device("cpu")
ALL = batch_of([9, 4, 7, 6, 5])
SKETCHED = ([0, 2], [4, 3, 1])
"""Examples of each micro-batch that is sketched."""
TRAINED = [3, 0, 1]
"""Of both of them, in another order."""
SHARES = torch.tensor([0.5, 0.2, 0.3])


def module_of(family: str, packs: bool, **options) -> ExampleLoss:
    base = base_model(family, num_hidden_layers=3, **options)
    use_packing(base, "auto" if packs else "off", CPU)
    keep_block_inputs_only(base)
    return ExampleLoss(with_adapters(base))


def gradients(module: ExampleLoss, batch: Batch) -> list[torch.Tensor]:
    losses = module(batch)
    module.zero_grad()
    (losses * SHARES[: len(losses)]).sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in module.parameters() if p.requires_grad)]


def hold(inputs: HeldBlockInputs, module: ExampleLoss, most: int = 9) -> None:
    with torch.no_grad(), inputs.holding(most):
        for rows in SKETCHED:
            module(some_of(ALL, rows, packed=module.packs))


@pytest.mark.parametrize(("store", "live"), [("device", 0), ("device", 1), ("device", 2), ("cpu", 2)])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_a_second_forward(family, packs, store, live):
    module = module_of(family, packs)
    trained = some_of(ALL, TRAINED, packed=module.packs)
    expected = gradients(module, trained)
    inputs = HeldBlockInputs(module, live, store)
    hold(inputs, module)
    inputs.arrange([trained])
    ran = count_calls(module)
    with inputs.reusing(trained):
        losses = module(trained)
    assert [calls > 0 for calls in ran] == [number >= live for number in range(3)]
    module.zero_grad()
    (losses * SHARES).sum().backward()
    # Once below the live block, in the backward; from there on twice, for they are checkpointed.
    assert ran == [1 if number < live else 2 for number in range(3)]
    found = [losses.detach(), *(p.grad for p in module.parameters() if p.requires_grad)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(module, trained), expected, rtol=1e-5, atol=1e-6)  # and as before without


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_where_a_block_is_checkpointed_outside_of_its_forward(family):
    module = module_of(family, packs=False)
    checkpoint_calls(module)
    check_reuse(module)


def test_where_a_block_returns_more_than_its_hidden_states():
    check_reuse(module_of("bamba", packs=False, **ZOO["bamba"].options))


def check_reuse(module: ExampleLoss) -> None:
    trained = some_of(ALL, TRAINED)
    expected = gradients(module, trained)
    inputs = HeldBlockInputs(module, 2)
    hold(inputs, module)
    inputs.arrange([trained])
    with inputs.reusing(trained):
        losses = module(trained)
    module.zero_grad()
    (losses * SHARES).sum().backward()
    found = [losses.detach(), *(p.grad for p in module.parameters() if p.requires_grad)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def checkpoint_calls(module: ExampleLoss) -> None:
    """Checkpoint the call of each block, hooks included, which transformers up to 5.22 does instead of its forward."""
    blocks = decoder_blocks(module.causal_model)[1]

    class Checkpointed(type(blocks[0])):
        def __call__(self, *args, **kwargs):
            call = partial(super().__call__, **kwargs)
            if self.gradient_checkpointing and self.training:
                return checkpoint(call, *args, use_reentrant=False)
            return call(*args)

    for block in blocks:
        block.__class__ = Checkpointed


def count_calls(module: ExampleLoss) -> list[int]:
    """Of each block how often its MLP or attention ran: its submodules are called only if it is."""
    ran = []
    for number, block in enumerate(decoder_blocks(module.causal_model)[1]):
        ran.append(0)

        def count(*_, number=number):
            ran[number] += 1

        next(block.children()).register_forward_hook(count)
    return ran


def test_without_a_graph_below_nothing_is_held_but_the_inputs():
    module = module_of("llama", packs=True)
    inputs = HeldBlockInputs(module, 2)
    hold(inputs, module)
    numbers = sum(x.numel() for held in inputs._held for x in held.inputs)
    assert numbers * 4 == sum(ALL.lengths) * inputs.bytes_per_token
    trained = some_of(ALL, TRAINED, packed=True)
    inputs.arrange([trained])
    assert not inputs._held
    (arranged,) = inputs._arranged.values()
    assert [len(x) for x in arranged] == [sum(trained.lengths)] * 3
    with inputs.reusing(trained):
        losses = module(trained)
    losses.sum().backward()
    assert not arranged  # let go of one by one


def test_only_as_many_micro_batches_are_held_as_asked_for():
    module = module_of("llama", packs=True)
    inputs = HeldBlockInputs(module, 1)
    hold(inputs, module, most=1)
    assert [held.batch.positions.tolist() for held in inputs._held] == [SKETCHED[0]]
    inputs.arrange([])
    hold(inputs, module, most=0)
    assert not inputs._held


def test_a_batch_that_only_keeps_step_starts_from_zeros():
    module = module_of("llama", packs=True)
    inputs = HeldBlockInputs(module, 2)
    hold(inputs, module, most=0)
    empty = some_of(ALL, [1], packed=True)
    empty = Batch(*(getattr(empty, n) for n in ("input_ids", "attention_mask", "targets")), torch.arange(0),
                  empty.lengths, empty.packing)
    inputs.arrange([empty])
    with inputs.reusing(empty):
        losses = module(empty)
    module.zero_grad()
    (losses * torch.zeros(1)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"attention_dropout": 0.1}])
def test_dropout_is_found(options):
    (name,) = options
    assert name.removeprefix("attention_") in dropout_of(ExampleLoss(adapted_model("llama", **options)))
    assert not dropout_of(ExampleLoss(adapted_model("llama")))


def test_pinned_blocks_count_as_large_as_torch_makes_them(monkeypatch):
    module = module_of("llama", packs=True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    on_device, on_cpu = (HeldBlockInputs(module, 2, store) for store in ("device", "cpu"))
    # A token has 32 float32 numbers, 128 bytes.
    tokens = torch.tensor([8, 9, 16, 17])
    assert on_device.tokens_of(tokens).tolist() == [8, 9, 16, 17]
    assert on_cpu.tokens_of(tokens).tolist() == [8, 16, 16, 32]
