"""Linear layers in 4 bits (QLoRA, Dettmers et al., NeurIPS 2023) whose weights an engine can shard.

bitsandbytes keeps 4-bit codes in a parameter of its own class, of integers, with their scales beside it. Engines that
shard make plain parameters of it, and not all of them take integers. Here codes and scales are the bytes of one plain
parameter in the type of the run, which any engine can cut, gather and free. The weights are those of bitsandbytes, bit
for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from colm_scale.modeling.weights import META, FileWeights, Part, sample

quantize_blockwise(torch.zeros(1))  # it keeps a table from its first call, which must not be made of fake tensors


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what ``--model.quantize nf4`` means: NormalFloat with scales in 8 bits, and products in ``dtype``."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


class PackedLinear(Linear4bit):
    """A linear layer that is quantised by `pack`; before, an ordinary one.

    Attributes:
        weight: ``[numbers]`` bytes of codes and scales, in a floating-point type.
        quant_state: The little else that makes weights of them, whole on every rank; None before.
        source_cls: Class of the layer that it has replaced.
    """

    source_cls: type

    def pack(self, device: torch.device, storage: torch.dtype) -> None:
        """Quantise the weight on ``device``, drop it, and keep the result in the type ``storage``."""
        weight = self.weight.data.to(device)
        if issubclass(self.source_cls, Conv1D):
            weight = weight.T
        codes, state = quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
        packed = torch.cat([codes.flatten(), state.absmax])
        packed = F.pad(packed, (0, -len(packed) % storage.itemsize))
        self.weight = nn.Parameter(packed.view(storage), requires_grad=False)
        state.absmax = state.absmax.new_empty(0)
        self.quant_state = state

    def unpacked(self) -> tuple[Tensor, QuantState]:
        """Return views of the whole weight: ``[bytes, 1]`` codes, and what makes weights of them."""
        state = copy.copy(self.quant_state)
        assert state is not None, "it is packed"
        numbers = self.in_features * self.out_features
        codes, scales = -(-numbers // 2), -(-numbers // state.blocksize)
        packed = self.weight.view(torch.uint8)
        state.absmax = packed[codes : codes + scales]
        return packed[:codes, None], state

    def forward(self, x: Tensor) -> Tensor:
        if self.quant_state is None:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        product: Tensor = _Product.apply(x.to(self.compute_dtype), self, bias)
        return product.to(x.dtype)


class _Product(torch.autograd.Function):
    """The product of an input and a packed weight.

    Its backward takes the weight from the layer, for which the engine gathers it again: kept in the graph, all gathered
    weights would stay until then. No gradient of the bias is computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        codes, state = layer.unpacked()
        product: Tensor = matmul_4bit(x, codes.t(), state, bias=bias)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight = dequantize_4bit(*ctx.layer.unpacked())
        return gradient @ weight.to(gradient.dtype), None, None


def make_quantisable(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace the linear layers of a model on the meta device that transformers quantises: all but the head."""
    quantizer = Bnb4BitHfQuantizer(nf4(dtype), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    quantizer.postprocess_model(model)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.__class__ = PackedLinear
            shape = layer.out_features, layer.in_features
            plain = nn.Parameter(torch.empty(shape, dtype=dtype, device=META), requires_grad=False)
            vars(plain).update(compress_statistics=True, quant_type="nf4")  # peft asks for them
            layer.weight = plain


def pack(model: nn.Module, device: torch.device, storage: torch.dtype) -> list[PackedLinear]:
    """Quantise the layers that `make_quantisable` has put into a model and that are not yet, and return them."""
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear) and layer.quant_state is None]
    for layer in layers:
        layer.pack(device, storage)
    return layers


class PackedWeights(FileWeights):
    """The weights of a model in files, quantised part by part: a rank never has more than one part in 16 bits.

    Args:
        device: Where to quantise, the device of the run, since the numbers may depend on it.
        dtype: The type of the run.
    """

    def __init__(self, model: PreTrainedModel, files: Iterable[str], device: torch.device, dtype: torch.dtype):
        super().__init__(model, files)
        make_quantisable(model, dtype)
        self._locate(model)
        self._paths = {module: path for path, module in model.named_modules()}
        self._device, self._storage = device, dtype

    def fill(self, part: Part) -> None:
        super().fill(part)
        for top in part if isinstance(part, list) else [part]:
            for layer in pack(top, self._device, self._storage):
                self._sampled[f"{self._paths[layer]}.weight"] = sample(layer.unpacked()[0])
