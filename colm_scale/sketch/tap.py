"""Hooks on the last block that branch and read it, and never write a weight (docs/method.md, Sketch).

Everything below the last block runs once per candidate. From that block on, the tap either repeats the micro-batch once
per branch and adds a different change to the probe's output in each (`zeroth_order`), or enables autograd so that
the probe's output has a gradient (`last_layer`). The hooks act on activations, so sharded, offloaded and quantised
weights need no special case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colm_scale.errors import UserError
from colm_scale.modeling.causal import hooked
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import Probe, trial_batch, without_dropout
from colm_scale.records import Batch, on_device

BRANCHES = 2
"""Branches that run at a time, one finite difference. A constant, and the least, so that memory does not grow with the
number of branches; all ranks run the last block equally often; and the shapes, which decide how sums are rounded, are
the same on all of them. An engine that shards the weights gathers those of the last block and of all outside the
blocks each time."""
_Arguments = tuple[tuple[object, ...], dict[str, object]]
"""A block's positional and keyword arguments."""


class Tap:
    """The last block of a model, and the probe in it.

    Args:
        model: The loss module around the adapted model.
        probe: The probe, with names as in the base model.
        like: A tap on a model with the same kind of blocks, to avoid a forward of this one.

    Attributes:
        lora_b: The module whose weight, at ``rows``, is the probe tensor.
        rows: ``[d_out]`` output rows of ``lora_b`` that belong to the probe.
        shape: ``(d_out, r)`` of the probe tensor.
        size: Numbers in the probe tensor, d, row by row.
        blocks: The decoder blocks.
        block: The last of them, at which branches and graph begin.

    Raises:
        UserError: The probe's layer has no LoRA adapter, or an adapter that does not go through a ``lora_B`` module.
    """

    def __init__(self, model: ExampleLoss, probe: Probe, like: Tap | None = None):
        self.model = model
        base = model.causal_model
        self.block = base.get_submodule(probe.block)
        self.blocks = next(m for m in base.modules() if isinstance(m, nn.ModuleList) and self.block in [*m])
        self.lora_b, self.rows = _lora_b(base.get_submodule(probe.layer), probe.layer), probe.rows
        self.shape = (len(probe.rows), self.lora_b.in_features)
        self.size = self.shape[0] * self.shape[1]
        self._batched: dict[str, int] = like._batched if like else self._find_batched_arguments()

    def branched_losses(self, batch: Batch, changes: Tensor) -> Tensor:
        """The losses under changes of the probe tensor, which itself is not written.

        Args:
            batch: ``B`` examples.
            changes: ``[branches, d]`` float32, added to the probe tensor in each branch.

        Returns:
            ``[branches, B]`` float32.
        """
        known: list[_Arguments] = []
        found = []
        for some in changes.split(BRANCHES):
            with self._last_block_only() if known else nullcontext():
                found.append(self._losses_of_branches(batch, some, known))
        return torch.cat(found)

    def _losses_of_branches(self, batch: Batch, changes: Tensor, known: list[_Arguments]) -> Tensor:
        """Compute `branched_losses` in one forward. ``known`` keeps the last block's inputs for further forwards."""
        branches, (d_out, r) = len(changes), self.shape
        weights = changes.view(branches, d_out, r).transpose(1, 2)

        def branch(_block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> _Arguments:
            if not known:
                known.append((args, kwargs))
            return _repeat(*known[0], self._batched, len(batch.input_ids), branches)

        def change(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            added = torch.bmm(args[0].reshape(branches, -1, r), weights.to(args[0]))
            return self._add_to(output, added.reshape(*output.shape[:-1], d_out))

        with hooked(
            self.block.register_forward_pre_hook(branch, with_kwargs=True),
            self.lora_b.register_forward_hook(change),
        ):
            return self.bare_losses(batch).view(branches, -1)

    @contextmanager
    def _last_block_only(self) -> Iterator[None]:
        """A context in which the model does not run the blocks below the last one, and no engine gathers them."""
        every = self.blocks._modules
        self.blocks._modules = {name: block for name, block in every.items() if block is self.block}
        try:
            yield
        finally:
            self.blocks._modules = every

    def factors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The exact per-example gradients of the probe tensor, as factors: ``G_i = delta_i.T @ a_i``.

        One forward, and one backward from the losses to the output of ``lora_B`` only.

        Returns:
            losses ``[B]``, delta ``[B, T, d_out]`` and a ``[B, T, r]``; padding has delta 0.
        """
        seen: list[Tensor] = []

        def start_graph(_block: nn.Module, _args: object, _kwargs: object) -> None:
            torch.set_grad_enabled(True)  # until the no_grad block of bare_losses ends

        def read(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[:] = args[0].detach(), output

        with hooked(
            self.block.register_forward_pre_hook(start_graph, with_kwargs=True),
            self.lora_b.register_forward_hook(read),
        ):
            losses = self.bare_losses(batch)
        a, output = seen
        (delta,) = torch.autograd.grad(losses.sum(), output)
        return losses.detach(), batch.by_example(self._of_output(delta)).float(), batch.by_example(a).float()

    def bare_losses(self, batch: Batch) -> Tensor:
        """``[B]`` losses of one forward without dropout and without the tap's hooks."""
        with torch.no_grad(), without_dropout(self.model):
            losses: Tensor = self.model(batch)
        # Under autocast around sketch and training, the training would take cached casts that have no gradient.
        torch.clear_autocast_cache()
        return losses

    def _of_output(self, output: Tensor) -> Tensor:
        """The probe's part ``[..., d_out]`` of ``lora_b``'s output or of its gradient."""
        return output[..., self._rows_at(output.device)] if self._is_part else output

    def _add_to(self, output: Tensor, added: Tensor) -> Tensor:
        """``lora_b``'s output plus ``added`` ``[..., d_out]``, as a new tensor."""
        return output.index_add(-1, self._rows_at(output.device), added) if self._is_part else output + added

    def _rows_at(self, device: torch.device) -> Tensor:
        """The rows there: they move once, when the model is where it stays."""
        self.rows = on_device(self.rows, device)
        return self.rows

    @property
    def _is_part(self) -> bool:
        return len(self.rows) < self.lora_b.out_features

    def _find_batched_arguments(self) -> dict[str, int]:
        """Find the block's tensor arguments whose first dimension is the micro-batch, by path.

        A first dimension can equal the micro-batch size by coincidence (as many examples as tokens), so this compares
        two micro-batches of different size. The values are multiples of the size (BLOOM's alibi: the number of heads).
        """
        sizes: list[dict[str, int]] = []

        def record(_block: nn.Module, args: object, kwargs: object) -> None:
            leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
            tensors = ((pytree.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor))
            sizes.append({path: leaf.shape[0] for path, leaf in tensors if leaf.ndim})

        device = next(self.model.parameters()).device
        with hooked(self.block.register_forward_pre_hook(record, with_kwargs=True)):
            for count in (2, 3):
                rows = [torch.arange(1, 8)] * (count - 1)
                rows.append(torch.arange(1, 5))  # padding, because some models drop a mask without any
                self.bare_losses(trial_batch(rows, device))
        two, *_, three = sizes
        return {path: size // 2 for path, size in two.items() if 3 * size == 2 * three.get(path, 0)}


def _repeat(
    args: tuple[object, ...], kwargs: dict[str, object], sizes: dict[str, int], count: int, branches: int
) -> _Arguments:
    """A block's arguments with a micro-batch of ``count`` repeated once per branch.

    Without padding there is no mask, or all examples share one; a shared one is not repeated.
    """

    def repeat(path: pytree.KeyPath, leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        size = sizes.get(pytree.keystr(path))
        if size is None or len(leaf) != size * count:
            return leaf
        return leaf.repeat(branches, *[1] * (leaf.ndim - 1))

    repeated: _Arguments = pytree.tree_map_with_path(repeat, (args, kwargs))
    return repeated


def _lora_b(layer: nn.Module, name: str) -> nn.Linear:
    if not isinstance(layer, LoraLayer) or not layer.lora_B:
        raise UserError(
            f"the probe {name} has no LoRA adapter: add it to --lora.targets, or name an adapted layer of the last "
            f"block with --selection.probe"
        )
    active = layer.active_adapters[0]
    variant = layer.lora_variant.get(active)
    if variant is not None:
        kind = type(variant).__name__
        raise UserError(
            f"the adapter of {name} is not plain LoRA but {kind}, whose output is not lora_B's alone: use plain LoRA, "
            f"or --selection.method stratified, which needs no sketch"
        )
    found = layer.lora_B[active]
    assert isinstance(found, nn.Linear)
    return found
