"""The second half of a step: route the coreset, and run its forward and backward through the engine (DESIGN 2.4)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.config import TrainConfig
from colm_scale.data.batching import Batching, weighted
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.modeling.forward_reuse import BlockInputs
from colm_scale.randomness import global_draws
from colm_scale.records import MicroBatch, Route
from colm_scale.selection.route import route, route_evenly
from colm_scale.selection.rule import loss_shares
from colm_scale.step.checks import check_losses
from colm_scale.step.select import Chosen
from colm_scale.step.source_refresh import SourceRefresh


@dataclass(frozen=True, slots=True)
class Routed:
    """A coreset dealt out to the ranks.

    Attributes:
        route: Which rank trains which candidate. Equal on every rank.
        shares: ``[n]`` what each candidate's loss counts for; zero where it is not selected.
        micro_batches: Those of this rank, as many as on every other.
    """

    route: Route
    shares: Tensor
    micro_batches: list[MicroBatch]


def route_coreset(
    chosen: Chosen, batching: Batching, loss: str, group: Group, *, micro_batches: int | None = None
) -> Routed:
    """Deal out the coreset.

    Args:
        loss: What is averaged, see `loss_shares`.
        micro_batches: How many every rank gets; by default as many as the token budget demands.
    """
    candidates, selection = chosen.candidates, chosen.selection
    label_tokens = chosen.examples.label_counts(candidates.indices[selection.positions])
    shares = torch.zeros(len(candidates))
    shares[selection.positions] = loss_shares(selection, label_tokens, loss)
    to_deal = candidates.lengths, selection.positions, group.world_size
    if micro_batches:
        routed = route_evenly(*to_deal, micro_batches, packed=batching.packed)
    else:
        held_on = chosen.sketched.held_on
        routed = route(*to_deal, batching.token_budget, packed=batching.packed, held_on=held_on)
    batches = batching.share(chosen.examples, candidates, routed.micro_batches[group.rank])
    return Routed(routed, shares, weighted(batches, shares, batching.device, routed.reused))


class TrainingStage:
    """Trains on a coreset. All ranks call it together.

    Args:
        inputs: Holds what the sketch has put into the blocks.
        refresh: Sees the hidden states of the forwards.
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
        self._batching, self._inputs, self._refresh = batching, inputs, refresh
        self._config, self._group = config, group

    def route(self, chosen: Chosen) -> Routed:
        """Deal out the coreset, and lay out the block inputs that are held for it."""
        routed = route_coreset(chosen, self._batching, self._config.loss, self._group)
        self._inputs.arrange([micro_batch.batch for micro_batch in routed.micro_batches if micro_batch.reuses_forward])
        return routed

    def __call__(self, chosen: Chosen, routed: Routed) -> Tensor:
        """Run forward and backward of the coreset.

        Returns:
            ``[n]`` losses of all ranks' examples, zero where not trained.

        Raises:
            TrainingError: On every rank: one of them is not finite.
        """
        group, last, step = self._group, len(routed.micro_batches), chosen.candidates.step
        losses = torch.zeros(len(chosen.candidates), device=group.device)
        with global_draws(group.device, self._config.seed, "dropout", step, group.rank):
            for number, micro_batch in enumerate(routed.micro_batches, 1):
                batch = micro_batch.batch
                reusing = self._inputs.reusing(batch) if micro_batch.reuses_forward else nullcontext()
                with reusing, self._refresh.watching():
                    own = self.engine.forward(batch)
                self.engine.backward((own * micro_batch.shares).sum(), last=number == last)
                losses[batch.positions.to(losses.device)] = own.detach()[: len(batch.positions)]
            self._refresh.gather(chosen.candidates)
            losses = group.all_reduce(losses, "report").cpu()
        check_losses(chosen.candidates, chosen.selection, losses)
        return losses
