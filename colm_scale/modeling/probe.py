"""Finding the probe tensor: the V projection of the last decoder block, by what it does rather than what it is called.

Of all linear layers of a block, only the values enter the attention output *linearly and across tokens*: a change of
V at the first token reaches later tokens in proportion to its size. Queries do not reach other tokens, keys reach them
through a softmax, and an MLP never mixes tokens. Testing that on one tiny forward finds V in every architecture, and
inside fused projections (Phi-3's qkv_proj) it finds the rows that belong to V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from colm_scale.errors import UserError

_TOKENS = 4
_LARGE = 1e4
"""Size of the large change: within float16's range, and enough to saturate a softmax through any key."""
_LINEAR_TOLERANCE = 0.05
"""Relative deviation from proportionality: half-precision rounding stays below it, a saturating softmax far above."""


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
            raise UserError(f"--selection.probe {layer!r} does not name one linear layer of the last block; {_listing(linears)}")
        return Probe(block_name, named[0], torch.arange(_width(linears[named[0]])))
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


@torch.no_grad()
def _value_rows(model: nn.Module, linears: dict[str, nn.Module], layer: nn.Module) -> Tensor:
    """Output rows of ``layer`` that act like values: ``[rows]`` int64, ascending, empty if there are none.

    One forward for a small change and one for a large. The batch holds the same tokens once per chunk of ``head_dim`` rows, each with that chunk
    changed at the first token, and once unchanged.
    """
    width = _width(layer)
    chunk = _head_dim(model, width)
    copies = width // chunk + 1
    direction = torch.linspace(-1, 1, chunk)[torch.randperm(chunk, generator=torch.Generator().manual_seed(0))]
    seen: list[dict[str, Tensor]] = []
    sizes: list[float] = []
    for size in (None, _LARGE):
        inputs: dict[str, Tensor] = {}

        def shift(_module, _args, output: Tensor, size=size):
            sizes.append(size or output.float().std().clamp(min=1e-6).item())
            change = torch.zeros(copies, width, dtype=output.dtype, device=output.device)
            for copy in range(copies - 1):
                change[copy, copy * chunk : (copy + 1) * chunk] = (direction * sizes[-1]).to(change)
            shifted = output.clone()  # OPT's MLP flattens tokens into rows: the view undoes that
            shifted.view(copies, -1, width)[:, 0] += change
            return shifted

        def watch(name, inputs=inputs):
            return lambda _module, args: inputs.__setitem__(name, args[0].detach()[:, -1].float())

        handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items() if module is not layer]
        handles.append(layer.register_forward_hook(shift))
        try:
            tokens = torch.arange(1, _TOKENS + 1).repeat(copies, 1).to(next(model.parameters()).device)
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        seen.append({name: (x[:-1] - x[-1]) / sizes[-1] for name, x in inputs.items() if x.ndim == 2 and len(x) == copies})
    linear = torch.zeros(copies - 1, dtype=torch.bool)
    for name in seen[0].keys() & seen[1].keys():
        small, large = seen[0][name], seen[1][name]
        reach = large.norm(dim=1)
        deviation = (small - large).norm(dim=1)
        linear |= ((reach > 0) & (deviation <= _LINEAR_TOLERANCE * reach)).cpu()
    return linear.repeat_interleave(chunk).nonzero().flatten()
