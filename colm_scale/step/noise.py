"""The noise of the gradient, from the training pass itself: without a further forward or backward.

A hook reads the gradient that every example of the coreset gives to one adapter's B matrix, multiplied from the left by
a few random rows of signs, which are drawn again in each step. Products of such gradients are those of the whole ones
on average, and short enough to be exchanged for each source. From their sums follow the variance of the step's
gradient and, what is left of its square, that of the mean: the numerator and denominator of the *gradient noise scale*
(McCandlish et al. 2018, appendix A.1), the batch at which noise and signal are equal.

Kept sources and quotas make a coreset more even than a random draw, and then the variance within each source counts
(the estimator of stratified sampling). Of a source with one example, noise has the same share in the squared gradient
as in those of the others: small sources often have one, and longer gradients. `random` and `full` have no quotas; all
their examples are one sample. Picks that a ranking has chosen are nearer to their source's mean than random ones: by
the ratio that the candidates' sketches show, as far as choosing can matter at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from colm_scale.errors import UserError
from colm_scale.modeling.causal import hooked
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import decoder_blocks
from colm_scale.randomness import generator
from colm_scale.records import Batch, Candidates, Selection, on_device

NUMBERS = 64
"""Least numbers read of a gradient, a multiple of the adapter's rank."""
UNSTRATIFIED = ("random", "full")
"""Methods without quotas."""
_Forward = Callable[[Batch], Tensor]


@dataclass(frozen=True, slots=True)
class GradientSums:
    """Sums over the coreset, from all ranks. On the CPU.

    Attributes:
        sums: ``[S, m]`` gradients of the examples of each of S sources, the sources of the coreset in ascending order.
        squares: ``[S]`` their squared lengths.
        mean: ``[m]`` the gradient of the step: the examples' gradients by their shares of the loss.
    """

    sums: Tensor
    squares: Tensor
    mean: Tensor


NO_SUMS = GradientSums(torch.zeros(0, 0), torch.zeros(0), torch.zeros(0))


class NoiseMeter:
    """Does nothing, for models and trainers whose gradients are not read."""

    def begin(self, candidates: Candidates) -> None:
        """Begin a step."""

    def forward(self, forward: _Forward, batch: Batch) -> Tensor:
        """Run the ``forward`` of a micro-batch, and read its gradients in the backward."""
        return forward(batch)

    def joined(self, losses: Tensor, candidates: Candidates, selection: Selection, shares: Tensor) -> Tensor:
        """Append this rank's sums to the ``losses`` of the candidates, to be added over ranks at once."""
        return losses

    def gathered(self, sums: Tensor) -> GradientSums:
        """Restore what `joined` has appended, on the CPU."""
        return NO_SUMS


class GradientNoise(NoiseMeter):
    """Reads the gradients of one linear layer's weight.

    Args:
        layer: A ``lora_B``.
        seed: Of the run; draws the signs.
        device: Where the model computes.
    """

    def __init__(self, layer: nn.Linear, seed: int, device: torch.device):
        self._layer, self._seed, self._device = layer, seed, device
        self._count = max(1, NUMBERS // layer.in_features)
        self._size = self._count * layer.in_features
        self._signs = self._read = torch.zeros(0)

    def begin(self, candidates: Candidates) -> None:
        draw = generator(self._seed, "gradient noise", candidates.step)
        drawn = torch.randint(2, (self._layer.out_features, self._count), generator=draw)
        self._signs = on_device((2.0 * drawn - 1) / self._count**0.5, self._device)
        self._read = torch.zeros(len(candidates), self._size, device=self._device)

    def forward(self, forward: _Forward, batch: Batch) -> Tensor:
        if not len(batch.positions):
            return forward(batch)
        shares: list[Tensor] = []  # of each example in the loss, times what the engine multiplies it by

        def watch(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad and output[..., 0].numel() == batch.input_ids.numel():
                a = args[0].detach()
                output.register_hook(lambda delta: self._keep(batch, a, delta, shares))

        # Removed after the forward: what activation checkpointing computes again has no backward of its own.
        with hooked(self._layer.register_forward_hook(watch)):
            losses = forward(batch)
        losses.register_hook(shares.append)
        return losses

    def _keep(self, batch: Batch, a: Tensor, delta: Tensor, shares: list[Tensor]) -> None:
        """Keep the gradients of the micro-batch's examples, from the layer's input and its output's gradient."""
        left, right = batch.by_example(delta.float() @ self._signs), batch.by_example(a.float())
        own = (left.transpose(1, 2) @ right).flatten(1)
        positions = on_device(batch.positions, self._device)
        self._read[positions] = own / shares[0][: len(own)].float().unsqueeze(1)

    def joined(self, losses: Tensor, candidates: Candidates, selection: Selection, shares: Tensor) -> Tensor:
        trained = selection.positions
        sources, member = candidates.sources[trained].unique(return_inverse=True)
        rows = self._read[on_device(trained, self._device)]
        one_hot = torch.zeros(len(sources) + 1, len(trained))
        one_hot[member, torch.arange(len(trained))] = 1
        one_hot[-1] = shares[trained]
        added = on_device(one_hot, self._device) @ torch.cat([rows, rows.square().sum(1, keepdim=True)], dim=1)
        return torch.cat([losses, added.flatten()])

    def gathered(self, sums: Tensor) -> GradientSums:
        rows = sums.view(-1, self._size + 1)
        return GradientSums(rows[:-1, :-1], rows[:-1, -1], rows[-1, :-1])


def make_noise_meter(module: ExampleLoss, seed: int, device: torch.device) -> NoiseMeter:
    """Read the adapter of the values in the last block (alone or fused with others), or else the block's first.

    Compiled blocks, adapters that are not plain LoRA, and models whose blocks are not found are not read.
    """
    try:
        block = decoder_blocks(module.causal_model)[1][-1]
    except UserError:
        return NoiseMeter()
    compiled = hasattr(block.forward, "_torchdynamo_orig_callable")
    layers = [
        (name, layer.lora_B[layer.active_adapters[0]])
        for name, layer in block.named_modules()
        if isinstance(layer, LoraLayer) and layer.lora_B and not layer.lora_variant
    ]
    plain = [(name, factor) for name, factor in layers if isinstance(factor, nn.Linear)]
    if compiled or not plain:
        return NoiseMeter()
    _, factor = min(plain, key=lambda named: "v" not in named[0].split(".")[-1])
    return GradientNoise(factor, seed, device)


def gradient_noise(
    gradients: GradientSums, sources: Tensor, selection: Selection, shares: Tensor, method: str, error: float
) -> tuple[dict[str, float], Tensor]:
    """Estimate noise and signal of a step's gradient.

    Args:
        sources: ``[n]`` of the candidates.
        shares: ``[n]`` of the candidates in the loss.
        method: Of the selection.
        error: Squared error of the selected sketches relative to that of a random draw; 1 without sketches.

    Returns:
        ``noise``, the variance of one example's gradient, and ``signal``, the squared length of their mean, both of
        unbiased estimates and so of either sign in one step; ``trained``, the number of equally weighted examples that
        the step's weights amount to; ``worth``, the number of random ones that they are worth; and ``freedom``, the
        degrees of freedom of ``noise``. Empty without two examples of a source, or if a gradient is not finite.
        ``[Q', 2]`` variance and squared mean of each source, Q' above the largest source; nan where unknown.
    """
    trained = selection.positions
    by_source = torch.full((int(sources.max()) + 1, 2), torch.nan, dtype=torch.float64)
    present, member = sources[trained].unique(return_inverse=True)
    sums, squares, mean = gradients.sums.double(), gradients.squares.double(), gradients.mean.double()
    if len(sums) < len(present):
        return {}, by_source
    counts, weights = torch.bincount(member).double(), shares[trained].double()
    lengths = sums.square().sum(1)
    within, freedom = squares - lengths / counts, counts - 1
    several = freedom > 0
    variance = torch.where(several, within / freedom, torch.nan)
    by_source[present, 0] = variance
    noisy = (counts * variance)[several].sum() / squares[several].sum()  # share of a squared length that is noise
    variance = torch.where(several, variance, noisy * squares)
    by_source[present, 1] = lengths / counts.square() - by_source[present, 0] / counts
    if method in UNSTRATIFIED:
        freedom = torch.tensor([len(trained) - 1.0])
        variance = ((squares.sum() - sums.sum(0).square().sum() / len(trained)) / (len(trained) - 1)).expand(len(sums))
    of_step = variance * torch.bincount(member, weights.square())
    drawn = (counts / torch.bincount(sources).double()[present] * of_step).sum()  # left if every mean is matched
    left = (drawn + error * (of_step.sum() - drawn)) / of_step.sum()
    size = 1 / weights.square().sum()
    found = {
        "noise": float(of_step.sum() * size),
        "signal": float(mean.square().sum() - left * of_step.sum()),
        "trained": float(size),
        "worth": float(size / left),
        "freedom": float(freedom.sum()),
    }
    return (found if torch.tensor([*found.values()]).isfinite().all() else {}), by_source
