"""Finding the probe tensor: the V projection of the last decoder block, by what it does rather than what it is called.

Of all linear layers of a block, only the values enter the attention output *linearly and across tokens*: a change of
V at the first token reaches later tokens in proportion to its size. Queries do not reach other tokens, keys reach them
through a softmax, and an MLP never mixes tokens. Testing that on one tiny forward finds V in every architecture, and
inside fused projections (Phi-3's qkv_proj) it finds the rows that belong to V.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from colm_scale.errors import UserError
from colm_scale.randomness import generator

_TOKENS = 4
_LARGE = 1e8
"""Size of the large change (less in float16, whose range ends before): saturates a softmax even through the keys of a
head that hardly looks, which at 1e4 some heads of a trained model still pass on in proportion."""
_SMALL = 16
"""Size of the small change in standard deviations of the layer's output: what is left of it after a sharp softmax has
averaged it over tokens still stands out of half-precision rounding."""
_LINEAR_TOLERANCE = 0.05
"""Relative deviation from proportionality. In the tested families values stay below 0.01, rounding in bfloat16
included, and everything else is above 100."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Where the sketch looks.

    Attributes:
        block: Qualified name of the last decoder block.
        layer: Qualified name of the linear layer whose LoRA B matrix is the probe tensor.
        rows: ``[d_out]`` int64 output rows of that layer that belong to the probe (all, unless it is fused).
    """

    block: str
    layer: str
    rows: Tensor


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: the ModuleList of like modules that holds most parameters."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder blocks, so the last block cannot be found")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def find_probe(model: nn.Module, layer: str | None = None) -> Probe:
    """Find the V projection of the last block of a causal language model that has no adapters yet.

    Args:
        model: The base model, on any device, in any floating-point type.
        layer: The user's choice (``--selection.probe``): a full name, or its end if that is unique.

    Raises:
        UserError: Nothing (or not exactly one layer) behaves like V, or ``layer`` is not a linear layer of the last
            block. Lists the layers that can be named.
    """
    blocks_name, blocks = decoder_blocks(model)
    block_name = f"{blocks_name}.{len(blocks) - 1}"
    linears = linear_layers(blocks[-1], block_name)
    if layer is not None:
        named = [name for name in linears if name == layer or name.endswith("." + layer)]
        if len(named) != 1:
            raise UserError(
                f"--selection.probe {layer!r} does not name one linear layer of the last block; {_listing(linears)}"
            )
        return Probe(block_name, named[0], torch.arange(_width(linears[named[0]])))
    with without_dropout(model):
        found = {name: rows for name, module in linears.items() if len(rows := _value_rows(model, linears, module))}
    if len(found) != 1:
        several = f"{len(found)} layers behave like one" if found else "no layer behaves like one"
        raise UserError(
            f"cannot tell the V projection of {type(model).__name__}: {several}. Name the layer to probe with "
            f"--selection.probe; {_listing(linears)}"
        )
    name, rows = next(iter(found.items()))
    return Probe(block_name, name, rows)


def linear_layers(block: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Layers with a two-dimensional weight that peft can adapt, by qualified name."""
    return {
        f"{prefix}.{name}": module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit", "Linear8bitLt")
    }


def _listing(linears: dict[str, nn.Module]) -> str:
    return "its linear layers are: " + ", ".join(linears)


def _width(module: nn.Module) -> int:
    return getattr(module, "out_features", None) or module.nf


def _head_dim(model: nn.Module, width: int) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return head_dim if width % head_dim == 0 else width


def _value_rows(model: nn.Module, linears: dict[str, nn.Module], layer: nn.Module) -> Tensor:
    """Output rows of ``layer`` that act like values: ``[rows]`` int64, ascending, empty if there are none.

    A row acts like one if some other layer feels a change of it at another token, and feels a large change in
    proportion to a small one.
    """
    width = _width(layer)
    chunk = _head_dim(model, width)
    others = {name: module for name, module in linears.items() if module is not layer}
    large_size = min(_LARGE, torch.finfo(model.dtype).max / 6)
    small, large = (_responses(model, layer, others, width, chunk, size) for size in (None, large_size))
    linear = torch.zeros(width // chunk, dtype=torch.bool)
    for name in small.keys() & large.keys():
        reach = large[name].norm(dim=1)
        deviation = (small[name] - large[name]).norm(dim=1)
        linear |= ((reach > 0) & (deviation <= _LINEAR_TOLERANCE * reach)).cpu()
    return linear.repeat_interleave(chunk).nonzero().flatten()


@torch.no_grad()
def _responses(
    model: nn.Module, layer: nn.Module, others: dict[str, nn.Module], width: int, chunk: int, size: float | None
) -> dict[str, Tensor]:
    """How the inputs of the other layers change at the last token when ``layer``'s output changes at the first.

    The batch holds the same tokens once per ``chunk`` output rows, each with those rows changed, and once unchanged.

    Args:
        size: Of the change. None: `_SMALL` standard deviations of the layer's output.

    Returns:
        By layer, ``[width // chunk, d_in]`` change of its input per unit of size.
    """
    copies = width // chunk + 1
    order = torch.randperm(chunk, generator=generator(0, "probe finding"))
    changes = torch.zeros(copies, width)
    changes[:-1] = torch.block_diag(*[torch.linspace(-1, 1, chunk)[order]] * (copies - 1))
    sizes: list[float] = []
    inputs: dict[str, Tensor] = {}

    def shift(_module, _args, output: Tensor) -> Tensor:
        sizes.append(size or _SMALL * output.float().std().clamp(min=1e-6).item())
        shifted = output.clone()  # OPT's MLP flattens tokens into rows: the view undoes that
        shifted.view(copies, -1, width)[:, 0] += (changes * sizes[-1]).to(output)
        return shifted

    def watch(name: str):
        return lambda _module, args: inputs.__setitem__(name, args[0][:, -1].float())

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in others.items()]
    handles.append(layer.register_forward_hook(shift))
    try:
        tokens = torch.arange(1, _TOKENS + 1, device=next(model.parameters()).device).repeat(copies, 1)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (x[:-1] - x[-1]) / sizes[-1] for name, x in inputs.items() if x.ndim == 2 and len(x) == copies}
