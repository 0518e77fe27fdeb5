"""A model that somebody else has loaded, adapted and sharded, made ready to be sketched."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from colm_scale.config import RunConfig
from colm_scale.data.batching import make_batch
from colm_scale.errors import UserError
from colm_scale.modeling.attention import PACKED, PACKED_SDPA
from colm_scale.modeling.causal import CausalModel, moved
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import find_probe, without_dropout
from colm_scale.modeling.sample import in_last_block, sample_of_model
from colm_scale.sketch.tap import Tap


def prepare(model: CausalModel, config: RunConfig, device: torch.device) -> tuple[ExampleLoss, Tap | None]:
    """The loss around a model, and the tap on its probes where the method sketches. All ranks call it together.

    What is found out by trying is tried on a sample, for the model may be in shards, and has adapters.

    Args:
        model: A causal language model of transformers, or peft's model around one, without what trains it (DDP, an
            engine), but sharded as it is to be.
        device: Where it computes.

    Raises:
        UserError: It is none, or it has no adapter where the probe is.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise UserError(f"{type(base).__name__} is no model of transformers, so its decoder blocks cannot be found")
    module = ExampleLoss(model, whole=True)
    own = base.config._attn_implementation
    packs = own in ("sdpa", PACKED, PACKED_SDPA)
    sample = moved(sample_of_model(base, "sdpa" if packs else "eager"), base.dtype)
    if packs:
        module.padded_because = use_packing(sample, config.train.packing, device)
        base.config._attn_implementation = sample.config._attn_implementation
    if config.selection.method != "colm":
        _look_at_logits(module, device)
        return module, None
    if model is base:
        raise UserError(
            "method colm compares gradients of a LoRA adapter, and this model has none: add adapters with peft, or "
            "give SelectionConfig(method='stratified'), which compares nothing"
        )
    probe = find_probe(sample, config.selection.probe)
    return module, Tap(module, in_last_block(base, probe))


def _look_at_logits(module: ExampleLoss, device: torch.device) -> None:
    """The first forward, which may run twice, as none must that a backward follows."""
    row = torch.arange(1, 8)
    with torch.no_grad(), without_dropout(module):
        module(make_batch([row], [torch.ones_like(row, dtype=torch.bool)], torch.arange(1), 0, device))
