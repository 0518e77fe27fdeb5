"""Training under DeepSpeed ZeRO."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from colm_scale.config import TrainConfig
from colm_scale.distributed.group import Group
from colm_scale.engines.base import (
    WEIGHT,
    Engine,
    Part,
    Update,
    remember,
    unscale,
)
from colm_scale.engines.ds_config import NO_EXPERTS, zero_stage
from colm_scale.engines.fsdp import units
from colm_scale.engines.tensors import all_have_room, local_tensors
from colm_scale.errors import UserError
from colm_scale.modeling.causal import moved
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.targets import adapted_layers
from colm_scale.modeling.weights import WHOLE, Weights
from colm_scale.records import Batch, Json

_COUNTS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""DeepSpeed's counts of steps."""


class ZeroEngine(Engine):
    """Trains with DeepSpeed's engine.

    Adapters are float32 whatever the base's type, so DeepSpeed runs in its float32 mode and makes no second copy. Under
    stage 3 the model comes on the CPU, or without its weights, and moves to the device tensor by tensor.
    """

    name = "deepspeed"

    def __init__(
        self, module: ExampleLoss, config: TrainConfig, group: Group, ds_config: Json, weights: Weights = WHOLE
    ):
        deepspeed = _import_deepspeed(group)
        group.ensure_process_group()
        self._rank, self._group = group.rank, group
        self._stage = zero_stage(ds_config)
        self.is_sharded = self._stage > 0
        if self._stage == 3:
            _check_adapters(module)
            _shard(module, ds_config, group, weights)
        super().__init__(module, config, group.world_size)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=ds_config, dist_init_required=False
        )

    def forward(self, batch: Batch) -> Tensor:
        losses: Tensor = self._engine(batch)
        return losses

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        self._engine.set_gradient_accumulation_boundary(last)  # it stays as set, so set it every time
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        if self._stage and self.scale.scale != self._engine.optimizer.loss_scale:
            self._engine.optimizer.override_loss_scale(self.scale.scale)
        by_hand = 1.0 if self._stage else self.scale.scale
        self._engine.backward(loss * (self._ranks * by_hand), scale_wrt_gas=False)

    def reduced_bytes(self, micro_batches: int) -> int:
        # From stage 2 on a rank keeps only its part of a gradient, so each micro-batch is reduced.
        rounds = micro_batches if self._stage > 1 else 1
        return super().reduced_bytes(micro_batches) * rounds

    def step(self, learning_rate: float) -> Update:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        used = self.scale.scale
        norm = self._sharded_step() if self._stage else self._plain_step()
        finite = math.isfinite(norm)
        self.scale.update(finite=finite)
        return Update(norm, finite, used)

    def _sharded_step(self) -> float:
        self._engine.step()
        return math.inf if self._engine.optimizer.overflow else float(self._engine.get_global_grad_norm())

    def _plain_step(self) -> float:
        """Step under stage 0, where DeepSpeed neither scales the loss nor skips a gradient that is not finite."""
        unscale(self._parameters.values(), self.scale.scale)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._max_norm))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    @contextmanager
    def gathered(self) -> Iterator[bool]:
        if self._stage < 3:
            yield True
        elif not all_have_room(self.module, self._group):
            yield False
        else:
            from deepspeed.runtime.zero import GatheredParameters

            self._engine.empty_partition_cache()  # waits for what was prefetched
            offload = self._engine.optimizer.parameter_offload
            # Each hook would release its layer's weights, and record an order of layers that must be that of all ranks.
            with GatheredParameters(self.module.parameters()), _off([*offload.forward_hooks, *offload.backward_hooks]):
                yield True

    def snapshot(self) -> Callable[[], None]:
        # DeepSpeed trains float32 partitions and copies them into the module: restore both.
        rewrite = remember(tensor for parameter in self._parameters.values() for tensor in local_tensors(parameter))
        restore_stepped, counts = super().snapshot(), {name: getattr(self._engine, name) for name in _COUNTS}

        def restore() -> None:
            restore_stepped()
            rewrite()
            for name, count in counts.items():
                setattr(self._engine, name, count)

        return restore

    def part(self, name: str, key: str) -> Part:
        parameter: Any = self._parameters[name]
        if not self._stage:
            return super().part(name, key)
        self._begin_state()
        if self._stage < 3:
            cut = parameter._hp_mapping  # none on a rank whose partition has nothing of it
            if cut is None:
                return Part(parameter.shape, 0, parameter.new_empty(0))
            values = cut.get_hp_fragment(None if key == WEIGHT else key)
            return Part(parameter.shape, cut.lp_fragment_address.start, values.detach())
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        padded = (
            safe_get_local_fp32_param(parameter) if key == WEIGHT else safe_get_local_optimizer_state(parameter, key)
        )
        start = min(parameter.ds_numel, self._rank * len(padded))
        return Part(parameter.ds_shape, start, padded[: parameter.ds_numel - start])

    @torch.no_grad()
    def write(self, name: str, key: str, value: Tensor) -> None:
        self._begin_state()
        parameter = self._parameters[name]
        if not self._stage:
            super().write(name, key, value)
        elif self._stage < 3:
            self._write_partition(parameter, key, value)
        else:
            self._write_shard(parameter, key, value)

    def _write_partition(self, parameter: Tensor, key: str, value: Tensor) -> None:
        """Write under stages 1 and 2: the module has the whole tensor, and each rank trains a part of it in float32."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key == WEIGHT:
            parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _write_shard(self, parameter: Tensor, key: str, value: Tensor) -> None:
        """Write under stage 3: each rank has a shard, the last one padded."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        assert hasattr(parameter, "ds_tensor")
        size = parameter.ds_tensor.numel()
        padded = value.new_zeros(size * self._ranks)
        padded[: value.numel()] = value.flatten()
        own = padded[self._rank * size :][:size]
        if key != WEIGHT:
            safe_set_local_optimizer_state(parameter, own, key)
            return
        safe_set_local_fp32_param(parameter, own)
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def _stepped(self) -> list[Tensor]:
        # Float32 partitions of all adapters together, or (stage 0) the adapters.
        found: list[Tensor]
        match self._stage:
            case 0:
                found = super()._stepped()
            case 3:
                found = self._engine.optimizer.fp32_partitioned_groups_flat
            case _:
                found = self._engine.optimizer.single_partition_of_fp32_groups
        return found

    def _begin_state(self) -> None:
        super()._begin_state()
        if self._stage in (1, 2):  # DeepSpeed finds the state of each adapter in that of the partition
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _check_adapters(module: ExampleLoss) -> None:
    """Check that ZeRO-3 can gather the weights with adapters.

    Raises:
        UserError: Some are experts'. They are read outside the modules that hold them, where nothing gathers them.
    """
    if any(adapted_layers(module.model).values()):
        raise UserError(NO_EXPERTS)


def _shard(module: ExampleLoss, ds_config: Json, group: Group, weights: Weights) -> None:
    """Fill one part after the other and cut its parameters, so that no other is whole; then move the buffers.

    `deepspeed.initialize` would first move the whole model, if it finds no parameter that is cut.
    """
    from deepspeed import init_distributed, zero

    init_distributed(dist_init_required=False)  # it counts the ranks
    dtype = next(module.parameters()).dtype
    for unit in units(module.causal_model):
        weights.fill(unit)
        for part in unit if isinstance(unit, list) else [unit]:
            zero.Init(module=part, config_dict_or_path=ds_config, dtype=dtype)
    moved(module, group.device)  # only buffers are left to move


@contextmanager
def _off(handles: list[RemovableHandle]) -> Iterator[None]:
    """Switch hooks off; afterwards each is in its old place among those of its module."""
    numbers = {handle.id for handle in handles}
    places = {id(hooks): hooks for handle in handles if (hooks := handle.hooks_dict_ref()) is not None}
    before = [(hooks, dict(hooks)) for hooks in places.values()]
    for hooks, _ in before:
        for number in numbers & hooks.keys():
            del hooks[number]
    try:
        yield
    finally:
        for hooks, all_of_them in before:
            hooks.clear()
            hooks.update(all_of_them)


def _import_deepspeed(group: Group) -> ModuleType:
    os.environ.setdefault("LOCAL_RANK", str(group.local_rank))
    if group.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it looks for others and warns
    import deepspeed

    # Use gloo instead of its shared-memory kernel for CPUs. The kernel is compiled at the first run, and a run that is
    # killed meanwhile leaves a lock that every later run waits for without end.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    loaded: ModuleType = deepspeed
    return loaded
