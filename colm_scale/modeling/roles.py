"""The roles of the linear layers in a decoder block, found by perturbing their outputs rather than by their names.

Of all linear layers of a block, only the values enter the attention output *linearly and across tokens*: a change of
V at one token reaches later ones in proportion to its size. Keys reach them through a softmax, queries change
only their own token, and an MLP never mixes tokens. Testing this on tiny forwards finds V, Q and K in every
architecture, and inside fused projections (Phi-3's qkv_proj) it finds the rows that belong to each. The output
projection is the first layer that V reaches; the MLP's last layer is the last one to run that is as wide as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from colm_scale.errors import UserError
from colm_scale.modeling.causal import hooked
from colm_scale.randomness import generator

ROLES = {
    "v": "V projection",
    "q": "Q projection",
    "k": "K projection",
    "o": "output projection of the attention",
    "mlp": "last layer of the MLP",
}

_TOKENS = 4
_OWN, _EARLIER = slice(-1, None), slice(-1)
"""The observed token, and the tokens before it."""
_LARGE = 1e8
"""Size of a large change (smaller in float16, because of its range). It saturates a softmax even through the keys of a
head whose queries are close to zero; at 1e4 some heads of a trained model still respond in proportion."""
_SMALLER = 16
"""The second large change is smaller by this factor. It still saturates, and values exceed half-precision rounding even
in a head that hardly attends to the changed token. A power of two, so that both changes are rounded alike."""
_LINEAR_TOLERANCE = 0.05
"""Largest relative deviation from proportionality. In the tested families values stay below 0.001, half precision
included, and everything else is above 6; saturated layers are at 15."""


def find_role(model: PreTrainedModel, linears: dict[str, nn.Module], role: str) -> tuple[str, Tensor]:
    """Find the linear layer of the last block with a role, and the output rows that have it.

    Args:
        model: A causal language model without adapters, in evaluation mode.
        linears: The block's linear layers, by qualified name.
        role: One of `ROLES`.

    Returns:
        The layer's name, and int64 ``[rows]``, ascending.

    Raises:
        UserError: Not exactly one layer behaves like it; other roles are found relative to V. Lists the layers.
    """
    trials = _Trials(model, linears)
    reached = {name: trials.in_proportion(name) for name in linears}
    chunks = {name: torch.stack([*by_layer.values()]).any(0) for name, by_layer in reached.items()}
    if role != "v":
        value = _only("v", chunks, model)
        # The output projection is the first layer after the attention, so the first that values of other tokens reach.
        output = next(name for name, felt in reached[value].items() if felt.any())
        chunks = _chunks_of(role, trials, output, chunks)
    name = _only(role, chunks, model)
    return name, chunks[name].repeat_interleave(width(linears[name]) // len(chunks[name])).nonzero().flatten()


def width(module: nn.Module) -> int:
    """Output features of a linear layer."""
    found = getattr(module, "out_features", None) or module.nf
    assert isinstance(found, int)
    return found


def listing(linears: Iterable[str]) -> str:
    """The end of an error message, with the layers to choose from."""
    return "its linear layers are: " + ", ".join(linears)


def _only(role: str, chunks: dict[str, Tensor], model: nn.Module) -> str:
    found = [name for name, has_role in chunks.items() if has_role.any()]
    if len(found) != 1:
        several = f"{len(found)} layers behave like one" if found else "no layer behaves like one"
        raise UserError(
            f"cannot identify the {ROLES[role]} of {type(model).__name__}: {several}. Name the layer to probe with "
            f"--selection.probe; {listing(chunks)}"
        )
    return found[0]


def _chunks_of(role: str, trials: _Trials, output: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The chunks of each layer with a role other than V: bool ``[chunks]`` by layer, in the order of ``values``."""
    linears = trials.linears
    order = trials.order()
    every, none = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    found = dict.fromkeys(values, none)
    match role:
        case "q":
            for name in order[: order.index(output)]:
                found[name] = trials.felt(name, _OWN, output) & ~trials.felt(name, _EARLIER, output)
        case "k":
            for name in order[: order.index(output)]:
                found[name] = trials.felt(name, _EARLIER, output) & ~values[name]
        case "o":
            found[output] = every
        case "mlp":
            wide = [name for name in order if width(linears[name]) == width(linears[output])]
            if wide[-1] != output:
                found[wide[-1]] = every
    return found


class _Trials:
    """Tiny forwards in which one layer's output is changed and the inputs of the others are observed.

    A *chunk* is a head's share of a layer's output rows. A batch repeats the same tokens once per chunk, and changes
    that chunk.
    """

    def __init__(self, model: PreTrainedModel, linears: dict[str, nn.Module]):
        self._model, self.linears = model, linears
        self._large = min(_LARGE, torch.finfo(model.dtype).max / 6)
        self._unchanged: dict[int, dict[str, Tensor]] = {}

    def order(self) -> list[str]:
        """The layers that see all tokens, in execution order."""
        return list(self._without_change(1))

    def in_proportion(self, name: str) -> dict[str, Tensor]:
        """The chunks of a layer that act like values: bool ``[chunks]`` by other layer, in execution order.

        Such a chunk changes the other layer's input at another token, in proportion to its own change. Most layers
        reach no other token at all, as one forward shows in which all their chunks change.
        """
        together = self._changes(name, _EARLIER, self._large, 1)
        if not any(change.any() for change in together.values()):
            return dict.fromkeys(together, torch.zeros(self._chunks(name), dtype=torch.bool))
        smaller, large = (self._changes(name, _EARLIER, self._large / by) for by in (_SMALLER, 1))
        felt = {}
        for other in large:
            reach = large[other].norm(dim=1)
            deviation = (smaller[other] - large[other]).norm(dim=1)
            felt[other] = ((reach > 0) & (deviation <= _LINEAR_TOLERANCE * reach)).cpu()
        return felt

    def felt(self, name: str, tokens: slice, by: str) -> Tensor:
        """The chunks of a layer whose change at ``tokens`` reaches another layer at the last token: bool ``[chunks]``.

        The change is large in both directions, because a softmax may already be saturated in one.
        """
        up, down = (self._changes(name, tokens, size)[by] for size in (self._large, -self._large))
        return ((up != 0) | (down != 0)).any(1).cpu()

    def _chunks(self, name: str) -> int:
        rows = width(self.linears[name])
        return rows // _head_dim(self._model, rows)

    def _changes(self, name: str, tokens: slice, size: float, copies: int | None = None) -> dict[str, Tensor]:
        """The changes of the other layers' inputs at the last token when a layer's output changes at ``tokens``.

        Both forwards have the same shape, so unchanged inputs are bitwise equal.

        Args:
            copies: One for each chunk, or 1 to change all chunks together.

        Returns:
            ``[copies, d_in]`` change of the input per unit of ``size``, by layer, in execution order.
        """
        layer, chunks = self.linears[name], self._chunks(name)
        copies, chunk = copies or chunks, width(layer) // chunks
        order = torch.randperm(chunk, generator=generator(0, "probe finding"))
        each = [torch.linspace(-1, 1, chunk)[order]] * chunks
        changes = torch.cat(each).unsqueeze(0) if copies == 1 else torch.block_diag(*each)

        def shift(_module: nn.Module, _args: object, output: object) -> Tensor | None:
            if not isinstance(output, Tensor):  # Llama 4's router is a linear layer that returns a pair
                return None
            shifted = output.clone()  # OPT's MLP flattens tokens into rows: the view undoes that
            shifted.view(copies, -1, width(layer))[:, tokens] += (changes * size).unsqueeze(1).to(output)
            return shifted

        before = self._without_change(copies)
        with hooked(layer.register_forward_hook(shift)):
            after = self._inputs(copies)
        return {other: (x - before[other]) / size for other, x in after.items() if other != name}

    def _without_change(self, copies: int) -> dict[str, Tensor]:
        if copies not in self._unchanged:
            self._unchanged[copies] = self._inputs(copies)
        return self._unchanged[copies]

    @torch.no_grad()
    def _inputs(self, copies: int) -> dict[str, Tensor]:
        """Each layer's input at the last token, ``[copies, d_in]``, in execution order.

        Layers that do not see all tokens, such as single experts, are left out.
        """
        inputs: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0]
                if x.numel() == copies * _TOKENS * x.shape[-1]:
                    inputs[name] = x.reshape(copies, _TOKENS, -1)[:, -1].float()

            return hook

        with hooked(*(module.register_forward_pre_hook(watch(name)) for name, module in self.linears.items())):
            tokens = torch.arange(1, _TOKENS + 1, device=next(self._model.parameters()).device).repeat(copies, 1)
            self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        return inputs


def _head_dim(model: PreTrainedModel, width: int) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return head_dim if width % head_dim == 0 else width
