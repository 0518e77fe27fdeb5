"""Weighted sums of per-example gradients of all adapters, from hooks on activations.

The gradient of a LoRA matrix is ``sum_t delta_t (x) a_t`` over the tokens of all examples, where ``delta`` is the
gradient of its output and ``a`` its input. A hook on each matrix sees both in the backward pass, so one backward gives
the gradients of any number of weightings. The loss is not differentiated with respect to parameters, so this works with
any sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from colm_scale.errors import UserError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.records import Batch


class AdapterTap:
    """The LoRA matrices of a model.

    Raises:
        UserError: Other parameters are trained too.
    """

    def __init__(self, model: ExampleLoss):
        self._model = model
        matrices = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if name.split(".")[-2:-1] in (["lora_A"], ["lora_B"])
        }
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if strange := [name for name in trained if name not in matrices]:
            raise UserError(
                f"only gradients of LoRA matrices can be compared, and {strange[0]} is trained too: use another "
                f"--lora.adapter"
            )
        self.matrices = {name: matrices[name] for name in trained}
        """Module of each trained parameter, by name; in the same order on every rank."""

    def gradients(self, batch: Batch, weights: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        """Gradients of weighted sums of the losses.

        Args:
            batch: ``B`` examples.
            weights: ``[m, B]``; the identity gives each example's own gradient.
            scale: Multiplies the losses, so that half precision can hold their gradients.

        Returns:
            ``{parameter: [m, *its shape]}`` float32.

        Raises:
            UserError: A layer does not see every token of every example.
        """
        found: dict[str, Tensor] = {}
        anchor = torch.zeros((), device=weights.device, requires_grad=True)

        def watch(name: str):
            def take(delta: Tensor, a: Tensor) -> None:
                if delta.shape[:-1].numel() != batch.input_ids.numel():
                    raise UserError(f"not every token passes through {name}: use other --lora.targets")
                delta, a = (batch.by_example(x).float() for x in (delta, a))
                of_layer = torch.tensordot(weights, delta.transpose(1, 2) @ a, 1)
                found[name] = found[name] + of_layer if name in found else of_layer

            return lambda _module, args, output: _Seen.apply(output, args[0], anchor, take)

        with ExitStack() as hooks, torch.enable_grad():
            for name, module in self.matrices.items():
                hooks.enter_context(module.register_forward_hook(watch(name)))
            losses = self._model(batch)
            torch.autograd.grad(losses.sum() * scale, anchor, allow_unused=True)
        return found


class _Seen(torch.autograd.Function):
    """The identity on a layer's output; its backward passes the gradient and the layer's input to ``take``.

    The input is saved by autograd, so activation checkpointing recomputes it. The loss is differentiated with respect
    to ``anchor``, which makes every backward run without touching parameters.
    """

    @staticmethod
    def forward(ctx, output: Tensor, a: Tensor, anchor: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(a)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx, delta: Tensor):
        (a,) = ctx.saved_tensors
        ctx.take(delta, a)
        return delta, None, None, None
