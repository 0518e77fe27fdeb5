"""Packed micro-batches: examples one after the other in a single row, none of which sees another.

Everything but attention treats tokens one by one, and attention is an interface of transformers: what is registered
here under a name runs wherever a model's configuration names it. Which tokens belong together reaches it as the
attention mask. A model hands a mask with four dimensions on as it is, so the offsets of the examples travel as one,
``[1, 1, longest, B + 1]``, whose third dimension is there for its size alone and takes no memory. Any other mask, and
none, means a padded batch, which the attention treats as sdpa does.
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
"""torch's flash kernel for sequences of any lengths where it runs (a GPU, half precision), else `PACKED_SDPA`."""
PACKED_SDPA = "packed_sdpa"
"""sdpa on the examples side by side, padded for as long as attention takes."""
_WINDOWS = "window_size" in inspect.signature(varlen_attn).parameters
"""Whether the flash kernel of this torch can look back a limited number of tokens."""
_sdpa: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward


def mask_of(packing: Packing) -> Tensor:
    """What a packed batch has in place of an attention mask."""
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
    offsets, longest = attention_mask[0, 0, 0], attention_mask.shape[2]
    run: Callable[..., Tensor] = _flash if may_flash and _takes_flash(query, value, kwargs) else _side_by_side
    return run(module, query, key, value, offsets, longest, **kwargs), None


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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> Tensor:
    rows, heads, tokens, _head_dim = query.shape
    groups = heads // key.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    # Further rows are branches of a sketch: the same examples again, one row of tokens later each.
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
    offsets: Tensor,
    longest: int,
    sliding_window: int | None = None,
    **kwargs: object,
) -> Tensor:
    rows, _, tokens, _ = query.shape
    examples = len(offsets) - 1
    mask = None
    if sliding_window is not None and sliding_window < longest:
        back = torch.arange(longest, device=query.device)
        back = back.unsqueeze(1) - back
        mask = ((back >= 0) & (back < sliding_window)).view(1, 1, longest, longest)
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

    # Padding stands behind the tokens of its example, which never look that way.
    found, _ = _sdpa(module, apart(query), apart(key), apart(value), mask, **kwargs)
    found = found.reshape(rows, examples * longest, *found.shape[2:])
    return found if places is None else found.index_select(1, places)
