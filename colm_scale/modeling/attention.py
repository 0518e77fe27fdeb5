"""Attention for packed micro-batches: the examples follow each other in one row, and none sees another.

All other layers treat each token separately. The functions here are registered in transformers' attention interface and
run in models whose configuration names them. The boundaries of the examples arrive as the attention mask: models pass a
four-dimensional mask through unchanged, so it holds the examples' offsets, expanded to ``[1, 1, longest, B + 1]``; the
third dimension only carries the length of the longest example and takes no memory. With any other mask, or none, the
batch is padded and runs as in sdpa.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from colm_scale.records import Packing

PACKED = "packed"
"""torch's flash kernel for variable lengths where it runs (on a GPU, in half precision), else `PACKED_SDPA`."""
PACKED_SDPA = "packed_sdpa"
"""sdpa on the examples side by side, padded within the attention only."""
_WINDOWS = "window_size" in inspect.signature(varlen_attn).parameters
"""True if the flash kernel of this torch supports a sliding window."""
_sdpa: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward


def mask_of(packing: Packing) -> Tensor:
    """The attention mask of a packed batch, int32 ``[1, 1, longest, B + 1]``."""
    return packing.offsets.expand(1, 1, packing.longest, -1)


def _packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    may_flash: bool = True,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """An attention function of transformers: ``[R, heads, T, head_dim]`` to ``[R, T, heads, head_dim]``."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return _sdpa(module, query, key, value, attention_mask, **kwargs)
    flash = may_flash and _takes_flash(query, value, kwargs)
    run: Callable[..., Tensor] = _flash if flash else partial(_side_by_side, module)
    return run(query, key, value, attention_mask, **kwargs), None


for _name, _function in ((PACKED, _packed), (PACKED_SDPA, partial(_packed, may_flash=False))):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _takes_flash(query: Tensor, value: Tensor, kwargs: dict[str, object]) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and (_WINDOWS or kwargs.get("sliding_window") is None)
        and not kwargs.get("dropout")
    )


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> Tensor:
    offsets, longest = mask[0, 0, 0], mask.shape[2]
    rows, heads, tokens, _head_dim = query.shape
    groups = heads // key.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    # Further rows are branches of a sketch: the same examples, each time one row of tokens later.
    shifts = torch.arange(rows, dtype=torch.int32, device=offsets.device).unsqueeze(1) * tokens
    every = torch.cat([offsets[:1], (offsets[1:] + shifts).flatten()])
    window = -1 if sliding_window is None else sliding_window - 1
    causal = {"window_size": (window, 0)} if _WINDOWS else {"is_causal": True}
    found = varlen_attn(q, k, v, every, every, longest, longest, scale=scaling, **causal)
    assert isinstance(found, Tensor)
    apart: Tensor = found.unflatten(0, (rows, tokens))
    return apart


def _side_by_side(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sliding_window: int | None = None,
    **kwargs: object,
) -> Tensor:
    offsets, longest = mask[0, 0, 0], mask.shape[2]
    rows, _, tokens, _ = query.shape
    examples = len(offsets) - 1
    window = None
    if sliding_window is not None and sliding_window < longest:
        back = torch.arange(longest, device=query.device)
        back = back.unsqueeze(1) - back
        window = ((back >= 0) & (back < sliding_window)).view(1, 1, longest, longest)
    places = None
    if examples * longest != tokens:
        token = torch.arange(tokens, dtype=torch.int32, device=offsets.device)
        example = torch.searchsorted(offsets, token, right=True) - 1
        places = example * longest + token - offsets[example]

    def apart(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # [R, T, heads, head_dim]
        if places is not None:
            x = x.new_zeros(rows, examples * longest, *x.shape[2:]).index_copy(1, places, x)
        return x.reshape(rows * examples, longest, *x.shape[2:]).transpose(1, 2)

    # Padding follows the tokens of its example, so the causal attention never sees it.
    found, _ = _sdpa(module, apart(query), apart(key), apart(value), window, **kwargs)
    found = found.reshape(rows, examples * longest, *found.shape[2:])
    return found if places is None else found.index_select(1, places)
