"""The hooks on the last decoder block: branch it, read it, never write a weight (DESIGN 2.1).

Everything below the last block runs once per candidate. From the block on, the tap either repeats the micro-batch once
per branch and adds a different change to the probe's output in each (`zeroth_order`), or switches autograd on so that
the probe's output has a gradient (`last_layer`). The hooks act on activations, so a sharded, offloaded or quantised
weight looks like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colm_scale.errors import UserError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import Probe, without_dropout
from colm_scale.records import Batch


class Tap:
    """The last block and the probe of one model.

    Args:
        model: The loss module around the adapted model.
        probe: Where the probe is, named as in the base model.

    Raises:
        UserError: The probe's layer has no LoRA adapter, or an adapter that does not go through a ``lora_B`` module.
    """

    def __init__(self, model: ExampleLoss, probe: Probe):
        self.model = model
        base = model.causal_model
        self.block = base.get_submodule(probe.block)
        self.lora_b = _lora_b(base.get_submodule(probe.layer), probe.layer)
        self.rows = probe.rows
        self.rank = self.lora_b.in_features
        self.shape = (len(probe.rows), self.rank)
        """``[d_out, r]`` of the probe tensor."""
        self._all_rows = len(probe.rows) == self.lora_b.out_features
        self._batched = self._find_batched_arguments()

    @property
    def size(self) -> int:
        """Numbers in the probe tensor, d."""
        return self.shape[0] * self.shape[1]

    def branched_losses(self, batch: Batch, changes: Tensor) -> Tensor:
        """Losses with the probe tensor changed, without changing it.

        Args:
            batch: ``B`` examples.
            changes: ``[branches, d_out, r]`` what is added to the probe tensor in each branch, in float32.

        Returns:
            ``[branches, B]`` float32.
        """
        branches = len(changes)

        def branch(_block, args, kwargs):
            return self._repeat(args, kwargs, len(batch.input_ids), branches)

        def change(_module, args, output: Tensor) -> Tensor:
            a = args[0].reshape(branches, -1, self.rank)
            added = torch.bmm(a, changes.to(a).transpose(1, 2)).reshape(*output.shape[:-1], self.shape[0])
            if self._all_rows:
                return output + added
            return output.index_add(-1, self.rows.to(output.device), added)

        with _hooks(
            self.block.register_forward_pre_hook(branch, with_kwargs=True), self.lora_b.register_forward_hook(change)
        ):
            return self.bare_losses(batch).view(branches, -1)

    def factors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The exact per-example gradient of the probe tensor, as factors: ``G_i = delta_i.T @ a_i``.

        One forward, and one backward from the losses to the output of ``lora_B`` only.

        Returns:
            losses ``[B]``, delta ``[B, T, d_out]``, a ``[B, T, r]``; padding has delta 0.
        """
        seen: dict[str, Tensor] = {}

        def start_graph(_block, _args, _kwargs):
            torch.set_grad_enabled(True)  # until the no_grad block of bare_losses ends

        def read(_module, args, output: Tensor) -> None:
            seen["a"], seen["out"] = args[0].detach(), output

        with _hooks(
            self.block.register_forward_pre_hook(start_graph, with_kwargs=True),
            self.lora_b.register_forward_hook(read),
        ):
            losses = self.bare_losses(batch)
        (delta,) = torch.autograd.grad(losses.sum(), [seen["out"]])
        shape = batch.input_ids.shape
        delta = delta.reshape(*shape, -1)
        if not self._all_rows:
            delta = delta[..., self.rows.to(delta.device)]
        return losses.detach(), delta.float(), seen["a"].reshape(*shape, -1).float()

    def bare_losses(self, batch: Batch) -> Tensor:
        """``[B]`` losses by one forward without dropout; the tap's hooks take part only inside its other methods."""
        with torch.no_grad(), without_dropout(self.model):
            return self.model(batch.input_ids, batch.attention_mask, batch.labels)

    def _repeat(self, args, kwargs, count: int, branches: int):
        def repeat(path, leaf):
            # A micro-batch without padding has no mask, or one that all examples share.
            if not isinstance(leaf, Tensor) or pytree.keystr(path) not in self._batched or len(leaf) % count:
                return leaf
            return leaf.repeat(branches, *[1] * (leaf.ndim - 1))

        return pytree.tree_map_with_path(repeat, (args, kwargs))

    def _find_batched_arguments(self) -> frozenset[str]:
        """Which tensor arguments of the block carry the micro-batch in their first dimension.

        A first dimension can equal the micro-batch by coincidence (as many examples as tokens), so the question is put
        to two micro-batches of different size: an argument is repeated only if its first dimension follows (BLOOM's
        alibi is as many times as long as there are heads).
        """
        shapes: list[dict[str, int]] = []

        def record(_block, args, kwargs):
            leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
            shapes.append(
                {pytree.keystr(path): leaf.shape[0] for path, leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
            )

        device = next(self.model.parameters()).device
        with _hooks(self.block.register_forward_pre_hook(record, with_kwargs=True)):
            for count in (2, 3):
                tokens = torch.arange(1, 8, device=device).repeat(count, 1)
                mask = torch.ones_like(tokens)
                mask[-1, -3:] = 0  # padding, so that models which drop an empty mask keep it
                self.bare_losses(Batch(tokens, mask, tokens.masked_fill(mask == 0, -100), torch.arange(count)))
        return frozenset(path for path, size in shapes[0].items() if 3 * size == 2 * shapes[1].get(path, 0))


@contextmanager
def _hooks(*handles) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lora_b(layer: nn.Module, name: str) -> nn.Module:
    adapters = getattr(layer, "lora_B", None)
    if not adapters:
        raise UserError(
            f"the probe {name} has no LoRA adapter: add it to --lora.targets, or name an adapted layer of the last "
            f"block with --selection.probe"
        )
    active = layer.active_adapters[0]
    variant = layer.lora_variant.get(active)
    if variant is not None:
        kind = type(variant).__name__
        raise UserError(
            f"the adapter of {name} is not plain LoRA but {kind}, whose output does not pass through lora_B alone: "
            f"use plain LoRA, or --selection.method stratified, which needs no sketch"
        )
    return adapters[active]
