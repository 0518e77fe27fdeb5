"""The loss of an example: the mean over its label tokens, computed only at these tokens (docs/method.md, Sketch).

The output embedding is the widest layer of the model, so it never sees tokens that carry no loss, nor all of a
micro-batch at once. A forward-pre-hook on it takes the final hidden states of the tokens whose shifted label counts,
and computes their cross-entropy chunk by chunk; the layer itself then multiplies a single row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from colm_scale.modeling.attention import PACKED, PACKED_SDPA, mask_of
from colm_scale.modeling.causal import CausalModel, base_of, hooked
from colm_scale.records import Batch, Targets

CHUNK_BYTES = 64 * 2**20
"""Most bytes of float32 logits alive at a time."""
_Post = Callable[[Tensor], Tensor]


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``post(hidden @ weight.T + bias)`` per row, for a head that is not trained.

    A frozen head needs no gradient itself, so the forward pass can compute the gradient of the hidden states chunk by
    chunk: it saves ``[N, hidden]`` numbers instead of ``[N, vocabulary]``, computes nothing twice, and the backward
    pass needs no weight (which a sharded engine would have to gather again).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, post: _Post, chunk: int
    ) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        trained = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden if trained else hidden[:0])
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                raw = F.linear(hidden[rows], weight, bias).detach().float().requires_grad_(True)
                nll = F.cross_entropy(post(raw), targets[rows], reduction="none")
            losses[rows] = nll.detach()
            if trained:
                (raw_gradient,) = torch.autograd.grad(nll, raw, torch.ones_like(nll))
                gradient[rows] = raw_gradient.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient.float() * output_gradient.unsqueeze(1)
        return scaled.to(gradient.dtype), None, None, None, None, None


def _cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, post: _Post, chunk: int
) -> Tensor:
    """Cross-entropy as in `_FrozenHeadCrossEntropy`, without a saved gradient."""
    if weight.dtype != hidden.dtype == torch.float32:
        return _cross_entropy_by_parts(hidden, weight, bias, targets, post)
    losses = [
        F.cross_entropy(post(F.linear(rows, weight, bias).float()), wanted, reduction="none")
        for rows, wanted in zip(hidden.split(chunk), targets.split(chunk))
    ]
    return torch.cat(losses)


def _cross_entropy_by_parts(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, post: _Post
) -> Tensor:
    """Cross-entropy in float32 with a head in half precision, of which a part of the vocabulary is copied at a time.

    The sum of exponentials goes on from part to part, relative to the largest logit so far (Milakov and Gimelshein
    2018).
    """
    part = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
    largest, total, own = hidden.new_full((3, len(hidden)), -math.inf)
    total.zero_()
    for start in range(0, len(weight), part):
        lifted = weight[start : start + part].float()
        added = None if bias is None else bias[start : start + part].float()
        chunk = max(1, CHUNK_BYTES // (4 * len(lifted)))
        for rows in map(slice, range(0, len(hidden), chunk), range(chunk, len(hidden) + chunk, chunk)):
            logits = post(F.linear(hidden[rows], lifted, added))
            most = torch.maximum(largest[rows], logits.amax(1))
            total[rows] = total[rows] * (largest[rows] - most).exp() + (logits - most.unsqueeze(1)).exp_().sum(1)
            largest[rows] = most
            place = targets[rows] - start
            found = logits.gather(1, place.clamp(0, len(lifted) - 1).unsqueeze(1)).squeeze(1)
            own[rows] = torch.where((place >= 0) & (place < len(lifted)), found, own[rows])
    losses: Tensor = total.log() + (largest - own)
    return losses


def _post_processing(config: PretrainedConfig) -> _Post:
    """The model's transformation of its logits (Gemma-2 caps them, Cohere and Granite scale them)."""
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    scale: float = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0

    def post(logits: Tensor) -> Tensor:
        logits = logits * scale if scale != 1.0 else logits
        return cap * torch.tanh(logits / cap) if cap else logits

    return post


class ExampleLoss(nn.Module):
    """A causal language model whose forward returns one loss per example. Engines wrap this module.

    ``forward(batch) -> [branches * B]`` float32 mean token losses; ``branches`` is 1 unless a sketch repeats the
    micro-batch at the last block. An example without a target has loss 0.

    A model may transform its logits in a way that `_post_processing` does not know. The first forward finds out by the
    one row that the head computes; from then on the model computes the logits of all label tokens itself, at once.

    Args:
        whole: Whether to call ``model`` itself, wrappers included, because another library has sharded it and gathers
            the weights outside the blocks in that call.

    Attributes:
        current_batch: The batch of the current forward.
    """

    current_batch: Batch

    def __init__(self, model: CausalModel, *, whole: bool = False):
        super().__init__()
        self.model = model
        self._whole = whole
        head = model.get_output_embeddings()
        frozen = not any(parameter.requires_grad for parameter in head.parameters())
        self._fused = frozen and type(head) is nn.Linear
        self._post = _post_processing(model.config.get_text_config())
        self._post_checked = False
        self.padded_because = ""
        """Why micro-batches are padded, from `use_packing`; empty if they are packed."""
        self.sdpa_because = ""
        """Why attention runs in sdpa though there is a flash kernel, from `use_packing` or `check_flash`."""
        self.watchers: list[Callable[[Batch, Tensor], None]] = []
        """Called in each forward with the batch and its last hidden states ``[*batch.input_ids.shape, c]``: the mean
        over the forward's branches, if a sketch repeats the micro-batch."""

    def knows_logits(self) -> None:
        """Trust `_post_processing` without checking the first forward."""
        self._post_checked = True

    def computes_logits_like(self, other: ExampleLoss) -> None:
        """Trust what the first forward of ``other``, with the same head, has found out."""
        self._fused, self._post_checked = other._fused, other._post_checked

    @property
    def fused_head(self) -> nn.Module | None:
        """The output embedding, if the loss multiplies its weight by itself."""
        return self.causal_model.get_output_embeddings() if self._fused else None

    @property
    def causal_model(self) -> PreTrainedModel:
        """The causal language model itself, with the adapters in its layers."""
        return base_of(self.model)

    @property
    def packs(self) -> bool:
        """True if the model takes packed micro-batches."""
        return self.causal_model.config._attn_implementation in (PACKED, PACKED_SDPA)

    def forward(self, batch: Batch, through: nn.Module | None = None) -> Tensor:
        """See the class; ``through`` is called in place of the model that it wraps (DDP, a DeepSpeed engine)."""
        if through is None:
            # Not through peft's wrapper, whose call would skip the hooks by which FSDP2 gathers the weights.
            through = self.model if self._whole else self.causal_model
        self.current_batch, current = batch, _Pass(batch)
        head = self.causal_model.get_output_embeddings()
        try:
            # Registered last, they run after ZeRO-3's hooks have gathered the head.
            with hooked(
                head.register_forward_pre_hook(partial(self._before_head, current)),
                head.register_forward_hook(current.keep_logits),
            ):
                logits: Tensor = through(input_ids=batch.input_ids, **_mask_arguments(batch), use_cache=False).logits
        finally:
            del self.current_batch
        if self._fused and not self._post_checked:
            self._post_checked = True
            self._fused = _close(self._post(current.raw_logits.float()), logits.float())
            if not self._fused:
                again: Tensor = self(batch, through)
                return again
        if not self._fused:
            current.losses = F.cross_entropy(logits[0].float(), current.wanted, reduction="none")
        found = _mean_per_example(current.losses.view(current.branches, len(batch.targets.tokens)), batch.targets)
        # A library that shards the whole model expects a gradient of its output in the backward: it gets zeros.
        return found + logits.flatten()[:0].sum() if self._whole and logits.requires_grad else found

    def _before_head(self, current: _Pass, head: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        targets, tokens = current.batch.targets, current.batch.input_ids.numel()
        current.branches = hidden.shape[:-1].numel() // tokens
        for watcher in self.watchers:
            states = hidden.detach().reshape(current.branches, tokens, -1).mean(0)
            watcher(current.batch, states.view(*current.batch.input_ids.shape, -1))
        taken = hidden.reshape(current.branches, tokens, -1)[:, targets.rows].flatten(0, 1)
        if not self._fused:
            return (taken.unsqueeze(0), *args[1:])
        chunk = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
        cross_entropy = _FrozenHeadCrossEntropy.apply if torch.is_grad_enabled() else _cross_entropy
        current.losses = cross_entropy(taken, head.weight, head.bias, current.wanted, self._post, chunk)
        return (hidden[:1, :1].to(head.weight.dtype), *args[1:])


class _Pass:
    """State of one forward: the losses ``[branches * N]`` of the target tokens, branch by branch."""

    def __init__(self, batch: Batch):
        self.batch, self.branches = batch, 1
        self.losses: Tensor
        self.raw_logits: Tensor

    @property
    def wanted(self) -> Tensor:
        return self.batch.targets.tokens.repeat(self.branches)

    def keep_logits(self, _head: nn.Module, _args: object, logits: Tensor) -> None:
        self.raw_logits = logits.detach()


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Compare two rows of logits, up to rounding to bfloat16."""
    return bool((ours - theirs).abs().max() <= 0.02 * theirs.abs().max())


def _mask_arguments(batch: Batch) -> dict[str, Tensor | None]:
    """The model's arguments that mask padding, or the other examples of a packed row."""
    if batch.packing is None:
        return {"attention_mask": batch.attention_mask}
    return {"attention_mask": mask_of(batch.packing), "position_ids": batch.packing.position_ids}


def _mean_per_example(losses: Tensor, targets: Targets) -> Tensor:
    """``[branches * B]`` mean loss of each example in each branch, from ``[branches, N]``; 0 where it has no target."""
    examples = len(targets.counts)
    spread = losses.new_zeros(len(losses), examples * targets.most).index_copy(1, targets.slots, losses)
    return (spread.view(len(losses), examples, targets.most).sum(2) / targets.counts.clamp(min=1)).flatten()
