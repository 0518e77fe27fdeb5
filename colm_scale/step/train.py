"""The second half of a step: route the coreset, and run its forward and backward through the engine."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.config import TrainConfig
from colm_scale.data.batching import Batching, weighted
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine, Update
from colm_scale.errors import TrainingError
from colm_scale.modeling.forward_reuse import BlockInputs
from colm_scale.randomness import global_draws
from colm_scale.records import Candidates, MicroBatch, Route, Selection, on_device
from colm_scale.selection.route import route, route_evenly
from colm_scale.selection.rule import loss_shares
from colm_scale.step.noise import NO_SUMS, GradientSums, make_noise_meter
from colm_scale.step.reuse_check import ReuseCheck
from colm_scale.step.select import Chosen
from colm_scale.step.source_refresh import SourceRefresh


@dataclass(frozen=True, slots=True)
class Routed:
    """A coreset distributed over the ranks.

    Attributes:
        route: The rank and micro-batch of each selected candidate. Equal on every rank.
        shares: ``[n]`` weight of each candidate's loss; zero if it is not selected.
        micro_batches: This rank's; every rank has the same number.
    """

    route: Route
    shares: Tensor
    micro_batches: list[MicroBatch]


@dataclass(frozen=True, slots=True)
class Trained:
    """A coreset after the optimizer step.

    Attributes:
        losses: ``[n]`` losses from all ranks, zero for candidates that were not trained.
        gradient_bytes: See `Engine.reduced_bytes`; 0 if another library trains.
        gradients: Sums of the examples' gradients; empty if they are not read.
    """

    routed: Routed
    losses: Tensor
    update: Update
    learning_rate: float
    gradient_bytes: int = 0
    gradients: GradientSums = NO_SUMS


def route_coreset(
    chosen: Chosen, batching: Batching, loss: str, group: Group, *, micro_batches: int | None = None
) -> Routed:
    """Distribute the coreset over the ranks.

    Args:
        loss: ``--train.loss``, see `loss_shares`.
        micro_batches: Number per rank; by default as many as the token budget requires.
    """
    candidates, selection = chosen.candidates, chosen.selection
    label_tokens = torch.ones(len(selection))
    if loss == "token":
        label_tokens = chosen.examples.label_counts(candidates.indices[selection.positions])
    shares = torch.zeros(len(candidates))
    shares[selection.positions] = loss_shares(selection, label_tokens, loss)
    to_deal = candidates.lengths, selection.positions, group.world_size
    if micro_batches:
        routed = route_evenly(*to_deal, micro_batches, packed=batching.packed)
    else:
        held_on = chosen.sketched.held_on
        routed = route(*to_deal, batching.token_budget, packed=batching.packed, held_on=held_on)
    batches = batching.share(chosen.examples, candidates, routed.micro_batches, group.rank)
    return Routed(routed, shares, weighted(batches, shares, batching.device, routed.reused))


class TrainingStage:
    """Trains on a coreset. All ranks call it together.

    Attributes:
        noise: Reads the examples' gradients.

    Args:
        inputs: Holds the block inputs for forward reuse.
        refresh: Records the hidden states for re-clustering.
    """

    def __init__(
        self,
        engine: Engine,
        batching: Batching,
        inputs: BlockInputs,
        refresh: SourceRefresh,
        config: TrainConfig,
        group: Group,
    ):
        self.engine = engine
        self._batching, self.inputs, self._refresh = batching, inputs, refresh
        self._check = ReuseCheck(engine, config.dtype, group)
        self.noise = make_noise_meter(engine.module, config.seed, group.device)
        self._config, self._group = config, group

    def route(self, chosen: Chosen) -> Routed:
        """Distribute the coreset over the ranks, and arrange the held block inputs accordingly."""
        routed = route_coreset(chosen, self._batching, self._config.loss, self._group)
        self.inputs.arrange([micro_batch.batch for micro_batch in routed.micro_batches if micro_batch.reuses_forward])
        return routed

    def __call__(self, chosen: Chosen, routed: Routed) -> Tensor:
        """Run forward and backward of the coreset.

        Returns:
            From all ranks, for `finish`: ``[n]`` losses, zero for candidates that were not trained, and the sums of
            gradients. The device may still be computing them.

        Raises:
            UserError: On every rank: forward reuse has changed the gradient, see `ReuseCheck`.
        """
        group, last, step = self._group, len(routed.micro_batches), chosen.candidates.step
        losses = torch.zeros(len(chosen.candidates), device=group.device)
        self.noise.begin(chosen.candidates)
        with global_draws(group.device, self._config.seed, "dropout", step, group.rank):
            for number, micro_batch in enumerate(routed.micro_batches, 1):
                batch = micro_batch.batch
                reusing = self.inputs.reusing(batch) if micro_batch.reuses_forward else nullcontext()
                with self._check(micro_batch, step), self.engine.micro_batch(last=number == last):
                    with reusing, self._refresh.watching():
                        own = self.noise.forward(self.engine.forward, batch)
                    self.engine.backward((own * micro_batch.shares).sum())
                losses[on_device(batch.positions, losses.device)] = own.detach()[: len(batch.positions)]
        computed = self.noise.joined(losses, chosen.candidates, chosen.selection, routed.shares)
        return group.all_reduce(computed, "report")

    def finish(self, chosen: Chosen, computing: Tensor) -> tuple[Tensor, GradientSums]:
        """Wait for the losses and the sums of gradients, and return them on the CPU.

        Raises:
            TrainingError: On every rank: a loss is not finite.
        """
        losses, sums = computing.cpu().tensor_split([len(chosen.candidates)])
        self._refresh.gather(chosen.candidates)
        check_losses(chosen.candidates, chosen.selection, losses)
        return losses, self.noise.gathered(sums)


def check_losses(candidates: Candidates, selection: Selection, losses: Tensor, *, updated: bool = False) -> None:
    """Refuse a loss of the coreset that is not finite.

    Args:
        losses: ``[n]`` of the candidates.
        updated: Whether the optimizer has already stepped, as it has in another library's training loop.

    Raises:
        TrainingError: Names step and ids.
    """
    bad = selection.positions[~losses[selection.positions].isfinite()]
    if len(bad):
        ids, changed = candidates.ids[bad].tolist(), "changed" if updated else "not changed"
        raise TrainingError(
            f"step {candidates.step}: the training loss of {len(ids)} selected example(s) is not finite, "
            f"ids {ids[:8]}{' ...' if len(ids) > 8 else ''}; the adapter was {changed} by this step. "
            f"Try a smaller --train.learning_rate, or look at these rows of the data"
        )


def check_update(update: Update, step: int) -> None:
    """Refuse a gradient that is not finite, unless the loss scale can still be reduced."""
    if not update.applied and update.loss_scale == 1.0:
        raise TrainingError(
            f"step {step}: the norm of the gradient is {update.norm}, though every loss is finite. "
            f"Try a smaller --train.learning_rate, or --train.dtype float32"
        )
