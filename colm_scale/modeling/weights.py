"""From the files to the shard: the weights of a model that was built without memory, one part at a time.

An engine that shards takes a model on the meta device. It asks for the weights of one part (the embedding, a block, the
head), cuts them, and goes on, so that a rank never holds more than its shards and one part. transformers renames and
converts the tensors of a part as it does those of a whole model.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from colm_scale.errors import UserError

META = torch.device("meta")
_MARK = "_is_hf_initialized"
"""Attribute by which transformers marks modules and tensors that are not to be initialised."""
_RESET = "reset_lora_parameters"
"""Method by which peft draws the adapters of a layer."""
_SAMPLE = 1024
"""Most elements of a sample."""
Part = nn.Module | list[nn.Module]
"""Modules that an engine cuts together."""


class Sample(NamedTuple):
    """What a model's digest reads of a weight: shape, type, and the bytes of at most 1,024 elements."""

    shape: tuple[int, ...]
    dtype: str
    read: bytes


class Weights:
    """The weights of a model that has them all: nothing is left to fill."""

    def fill(self, part: Part) -> None:
        """Give every tensor of ``part`` that is on the meta device its value, on the CPU."""

    def adding_adapters(self, *, new: bool) -> AbstractContextManager[object]:
        """Return a context for peft to add adapters in: ``new`` ones, which it draws, or others, which it reads."""
        return nullcontext()

    def samples(self, model: nn.Module) -> dict[str, Sample]:
        """Sample each frozen weight of ``model``, by its name without adapters."""
        frozen = ((name, weight) for name, weight in model.named_parameters() if not weight.requires_grad)
        # peft moves an adapted layer one level down.
        return {name.replace("base_layer.", ""): sample(weight.data) for name, weight in frozen}


WHOLE = Weights()


class FileWeights(Weights):
    """The weights of a model on the meta device, in safetensors files.

    Args:
        model: As transformers has loaded it to the meta device, frozen, still without adapters. Its buffers that no
            file has get their values.
        files: The safetensors files.
    """

    def __init__(self, model: PreTrainedModel, files: Iterable[str]):
        self._sources: dict[str, list[_Source]] = defaultdict(list)
        mapping = get_model_conversion_mapping(model)
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._mapping: list[WeightConverter | WeightRenaming] = [*self._converters]
        self._find_sources(model, files, [entry for entry in mapping if isinstance(entry, WeightRenaming)])
        self._like = copy.deepcopy(model)
        self._tie_equal(model)
        compute_buffers(model)
        self._drawn: dict[nn.Module, Callable[[], Tensor]] = {}
        self._sampled: dict[str, Sample] = {}
        self._locate(model)

    def _locate(self, model: PreTrainedModel) -> None:
        self._model, self._places = model, _places(model)

    def fill(self, part: Part) -> None:
        tops = part if isinstance(part, list) else [part]
        for module in [module for top in tops for module in top.modules() if module in self._drawn]:
            module.weight = nn.Parameter(self._drawn.pop(module)())
        every = (tensor for top in tops for tensor in (*top.parameters(), *top.buffers()))
        wanted = {tensor: self._places[tensor] for tensor in every if tensor.is_meta}
        found = self._read(place.path for places in wanted.values() for place in places)
        for tensor, places in wanted.items():
            value = next((found[place.path] for place in places if place.path in found), tensor)
            if value.is_meta:
                raise UserError(f"the model's files hold {places[0].path} in a form that only --engine ddp can load")
            if isinstance(tensor, nn.Parameter):
                self._sampled[places[0].path] = sample(value)
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            for place in places:
                setattr(place.module, place.name, value)

    def adding_adapters(self, *, new: bool) -> AbstractContextManager[object]:
        return self._drawing_later() if new else weightless(self._model)

    @contextmanager
    def _drawing_later(self) -> Iterator[None]:
        """A context in which peft puts new adapters on the meta device, like their layers.

        It has drawn them before, in its order; they are drawn again, with the same numbers, with the part they are in.
        """
        draw: Callable[..., None] = getattr(LoraLayer, _RESET)

        def drawn(layer: LoraLayer, name: str, init: object) -> None:
            first, second = layer.lora_A[name], layer.lora_B[name]
            dtype = layer.get_base_layer().get_parameter(getattr(layer, "parameter_name", "weight")).dtype
            self._drawn[first] = partial(_drawn, torch.get_rng_state(), first.get_parameter("weight").shape, dtype)
            self._drawn[second] = partial(torch.zeros, second.get_parameter("weight").shape)
            draw(layer, name, init)

        setattr(LoraLayer, _RESET, drawn)
        try:
            yield
        finally:
            setattr(LoraLayer, _RESET, draw)

    def samples(self, model: nn.Module) -> dict[str, Sample]:
        return self._sampled

    def _find_sources(self, model: PreTrainedModel, files: Iterable[str], renamings: list[WeightRenaming]) -> None:
        keys: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                keys |= dict.fromkeys(opened.keys(), file)
        known, prefix = model.state_dict(), model.base_model_prefix
        targets = {pattern: made.target_patterns for made in self._converters for pattern in made.source_patterns}
        for key in sorted(keys, key=dot_natural_key):  # some renamings depend on the keys before
            renamed, _ = rename_source_key(key, renamings, [])
            target, pattern = rename_source_key(renamed, [], self._converters, prefix, known)
            if target not in known:
                renamed = key
                target, pattern = rename_source_key(key, [], [], prefix, known)
            first, *others = targets[pattern] if pattern else [target]
            for path in (target, *(target.replace(first, other) for other in others)):
                self._sources[path].append(_Source(keys[key], key, renamed))

    def _tie_equal(self, model: PreTrainedModel) -> None:
        """Tie what is to be tied and in the files twice, if both are equal, as transformers does."""
        for pair in [*model.all_tied_weights_keys.items()]:
            target, source = map(model.get_parameter_or_buffer, pair)
            if target is source:
                continue
            found = self._read(pair)
            if torch.equal(found[pair[0]], found[pair[1]]):
                path, _, name = pair[0].rpartition(".")
                setattr(model.get_submodule(path), name, source)
            else:
                del model.all_tied_weights_keys[pair[0]]

    def _read(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors of the model, by path; those that the files lack are missing."""
        wanted = list(paths)
        sources = [source for path in wanted for source in self._sources.get(path, ())]
        with ExitStack() as opened:
            files = {file: opened.enter_context(safe_open(file, "pt")) for file in {source.file for source in sources}}
            slices = {source.renamed: files[source.file].get_slice(source.key) for source in sources}
            config = LoadStateDictConfig(weight_mapping=self._mapping)
            convert_and_load_state_dict_in_model(self._like, slices, config)
        return {path: tensor for path in wanted if not (tensor := _taken(self._like, path)).is_meta}


class _Source(NamedTuple):
    """A tensor in a file, and its key after transformers' renamings."""

    file: str
    key: str
    renamed: str


class _Place(NamedTuple):
    """A tensor of a module, and its path in the model without adapters."""

    module: nn.Module
    name: str
    path: str


def _places(model: nn.Module) -> dict[Tensor, list[_Place]]:
    """Where each tensor on the meta device is; one that is shared is in several places."""
    found: dict[Tensor, list[_Place]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                found[tensor].append(_Place(module, name, f"{path}.{name}".removeprefix(".")))
    return found


def weight_files(name: str, revision: str | None, only: str | None) -> list[str]:
    """Paths of a model's safetensors files, those that transformers reads.

    Args:
        only: The file that the model's configuration names, if it names one.
    """
    try:
        found = cached_file(name, only or SAFE_WEIGHTS_NAME, revision=revision)
    except OSError:  # it has several
        found = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
    assert found is not None  # else cached_file raises
    if not found.endswith(".json"):
        return [found]
    files: list[str] = get_checkpoint_shard_files(name, found, revision=revision)[0]
    return files


def compute_buffers(model: PreTrainedModel) -> None:
    """Give the buffers of a model on the meta device that no file has their values, on the CPU."""
    for name, buffer in [*model.named_non_persistent_buffers()]:
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, torch.empty_like(buffer, device="cpu"))
    _initialize(model)


def draw(model: PreTrainedModel, device: torch.device) -> None:
    """Draw every tensor of a model that is on the meta device from the model's own initial distribution, on ``device``.

    The others stay as they are.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        setattr(tensor, _MARK, not tensor.is_meta)
    for tensor, places in _places(model).items():
        value = torch.empty_like(tensor, device=device)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        for place in places:
            setattr(place.module, place.name, value)
    _initialize(model)


def _initialize(model: PreTrainedModel) -> None:
    """Initialise every tensor without transformers' mark that it has been."""
    for module in model.modules():
        module.__dict__.pop(_MARK, None)
    model.initialize_weights()


@contextmanager
def weightless(model: nn.Module) -> Iterator[None]:
    """A context in which weights on the meta device seem to be on the CPU; no memory is behind them.

    For peft, which puts adapters where the weights of their layer are.
    """
    places = _places(model)
    for weight, of_weight in places.items():
        seeming = torch.empty((), dtype=weight.dtype).expand(weight.shape)
        parameter = nn.Parameter(seeming, requires_grad=weight.requires_grad)
        vars(parameter).update(vars(weight))  # peft asks a 4-bit weight for its kind
        for place in of_weight:
            setattr(place.module, place.name, parameter)
    try:
        yield
    finally:
        for weight, of_weight in places.items():
            for place in of_weight:
                setattr(place.module, place.name, weight)


def _drawn(state: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A matrix A as peft draws it from a generator's state, and rounds it to the type of the layer."""
    generator = torch.Generator()
    generator.set_state(state)
    drawn = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
    return (drawn.to(dtype) if dtype.is_floating_point else drawn).float()


def _taken(model: PreTrainedModel, path: str) -> Tensor:
    """Take a tensor out of a model, and leave one on the meta device in its place."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    tensor: Tensor = getattr(module, name)
    empty = torch.empty_like(tensor, device=META)
    setattr(module, name, nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty)
    return tensor.data


def sample(data: Tensor) -> Sample:
    """Sample a weight of any type, at equal distances."""
    flat = data.reshape(-1)
    read = flat[:: max(1, math.ceil(len(flat) / _SAMPLE))].contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return Sample(tuple(data.shape), str(data.dtype), read)
