"""Parts of a step that record their work, for the tests of several ranks."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from colm_scale.distributed.group import Group
from colm_scale.engines import fsdp
from colm_scale.engines.base import Engine, LossScale, Update, trainable
from colm_scale.estimators.base import Estimator
from colm_scale.modeling.weights import Weights
from colm_scale.records import Batch, CandidateMatrix, Selection, SketchPlan
from colm_scale.selection.moments import Moments


class EngineSpy:
    """An engine that records its gradients before clipping."""

    def __init__(self, engine: Engine):
        self.inner, self.module, self.name = engine, engine.module, engine.name
        self.forward, self.backward, self.snapshot = engine.forward, engine.backward, engine.snapshot
        self.reduced_bytes = engine.reduced_bytes
        self.collectives: list[Counter[str]] = []
        self.counts = False
        self.gradients: list[dict[str, Tensor]] = []

    @property
    def scale(self) -> LossScale:
        return self.inner.scale

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        with self.counted(), self.inner.micro_batch(last=last):
            yield

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Add the collectives of a micro-batch, by name, to ``collectives`` if ``counts`` is set."""
        with torch.profiler.profile() if self.counts else nullcontext() as profile:
            yield
        self.collectives.append(collectives(profile) if profile else Counter())

    def step(self, learning_rate: float) -> Update:
        self.gradients.append({name: self._gradient(p).clone() for name, p in trainable(self.module).items()})
        return self.inner.step(learning_rate)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        if self.name == "deepspeed":
            from deepspeed.utils import safe_get_full_grad

            return safe_get_full_grad(parameter)
        gradient = parameter.grad
        return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def collectives(profile: torch.profiler.profile) -> Counter[str]:
    """Counts of a profile's collectives by name, including those that torch starts without Python."""
    names = [event.name for event in profile.events()]
    return Counter(name.removeprefix("c10d::") for name in names if name.startswith("c10d::"))


class EstimatorSpy:
    """An estimator that records its exchanges and, in the first step, its memory and largest tensor."""

    def __init__(self, estimator: Estimator, group: Group):
        self.inner, self._group = estimator, group
        self.steps: list[dict] = []

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    @property
    def moments(self) -> Moments:
        return self.inner.moments

    @moments.setter
    def moments(self, moments: Moments) -> None:
        self.inner.moments = moments

    def sketch(self, plan: SketchPlan, batches: list[Batch]) -> None:
        self._watch = LargestTensor() if not self.steps else nullcontext()
        self._before = live_numbers() if not self.steps else 0
        self.steps.append(
            {
                "sketched": len(plan.positions),
                "own": len(plan.rows_of(self._group.rank)),
                "padded": int(plan.counts.max()) * self._group.world_size,
                "ranked": plan.num_groups,
                "largest_micro_batch": max((len(batch.positions) for batch in batches), default=0),
            }
        )
        with self._watch:
            self.inner.sketch(plan, batches)

    def gather(self) -> CandidateMatrix:
        with self._watch:
            matrix = self.inner.gather()
        if len(self.steps) == 1:
            self.steps[0]["live"] = live_numbers() - self._before
        self.steps[-1] |= {
            "held": getattr(self.inner, "held_numbers", 0),
            "matrix": {name: getattr(matrix, name) for name in ("positions", "rows", "valid", "losses")},
            "coefficients": getattr(getattr(self.inner, "inner", self.inner), "_coefficients", None),
        }
        return matrix

    def learn(self, selection: Selection) -> None:
        with self._watch:
            self.inner.learn(selection)
        if len(self.steps) == 1:
            self.steps[0]["largest"] = self._watch.numbers
        self.steps[-1]["moments"] = tuple(self.inner.moments.tensors().values())


class LargestTensor(TorchDispatchMode):
    """Size of the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def live_numbers() -> int:
    """Numbers in all tensors created since `gc.freeze`; shared memory counts once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): (tensor.untyped_storage(), tensor) for tensor in tensors}
    return sum(storage.nbytes() // tensor.element_size() for storage, tensor in storages.values())


class WholeOnDevice(ExitStack):
    """Counts the numbers of a model's weights that are whole on the device while an engine is made.

    On a CPU nothing is copied there, so a weight counts from the moment on that it is asked to move (``Tensor.to``, or
    FSDP2's `fully_shard` of its unit), until its storage is cut or gone.

    Attributes:
        most, total: Numbers of all weights that were whole at a time, and of the model.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self._weights = {w.data_ptr(): (weakref.ref(w), w.numel()) for w in module.parameters()}
        self._moved: set[int] = set()
        self.most, self.total = 0, sum(numbers for _, numbers in self._weights.values())

    def __enter__(self):
        to, shard = Tensor.to, fsdp.fully_shard

        def moving(tensor: Tensor, *args, **kwargs) -> Tensor:
            if any(isinstance(given, torch.device) for given in (*args, *kwargs.values())):
                self._move([tensor])
            return to(tensor, *args, **kwargs)

        def sharding(unit, **options):
            modules = unit if isinstance(unit, list) else [unit]
            self._move(w for m in modules for w in m.parameters() if not isinstance(w, DTensor))
            return shard(unit, **options)

        self.enter_context(mock.patch.object(Tensor, "to", moving))
        self.enter_context(mock.patch.object(fsdp, "fully_shard", sharding))
        return self

    def _move(self, tensors) -> None:
        self._moved |= {tensor.data_ptr() for tensor in tensors if tensor.data_ptr() in self._weights}
        alive = [(weight(), numbers) for weight, numbers in (self._weights[moved] for moved in self._moved)]
        self.most = max(self.most, sum(n for weight, n in alive if weight is not None and weight.numel() == n))


class FillSpy(Weights):
    """Counts the numbers of a model's frozen weights that are whole on this rank while an engine fills and cuts them.

    Attributes:
        most, total: Numbers of all weights that were whole at a time, and of the model.
    """

    def __init__(self, inner: Weights, module: nn.Module):
        self._inner, self._module = inner, module
        self.most, self.total = 0, sum(weight.numel() for weight in self._frozen())

    def fill(self, part) -> None:
        self._inner.fill(part)
        whole = (w.numel() for w in self._frozen() if not w.is_meta and not isinstance(w, DTensor))
        self.most = max(self.most, sum(whole))  # what ZeRO-3 has cut has no numbers

    def samples(self, model: nn.Module):
        return self._inner.samples(model)

    def _frozen(self):
        return (weight for weight in self._module.parameters() if not weight.requires_grad)


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all frozen weights and buffers, gathered from all ranks, which call it together."""
    found = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            with _gathered(weight):
                found[name] = weight.full_tensor() if isinstance(weight, DTensor) else weight.detach().clone()
    return found


def _gathered(weight: Tensor):
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([weight])
