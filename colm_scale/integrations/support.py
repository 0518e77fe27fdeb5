"""Which of a trainer's arguments a coreset can follow, and what follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from colm_scale.config import SelectionConfig
from colm_scale.errors import UserError
from colm_scale.modeling.causal import CausalModel, base_of

if TYPE_CHECKING:
    from transformers import Trainer

_OPTIMIZERS = {
    "adamw": "adamw",
    "paged_adamw": "adamw",
    "adam": "adamw",
    "sgd": "sgd",
    "lion": "lion",
    "paged_lion": "lion",
    "adafactor": "adafactor",
}
"""The optimizer of ours by the beginning of the trainer's name for one, up to what says how it is computed."""
_HOW = ("torch_fused", "torch_8bit", "torch_4bit", "torch_xla", "torch_npu_fused", "torch", "32bit", "8bit", "bnb_8bit")


def loader_batch(selection: SelectionConfig, args: TrainingArguments, ranks: int) -> int:
    """How many candidates each of the loader's batches has.

    Raises:
        UserError: The budget is not what the trainer trains on in a step, or the candidates cannot be shared out.
    """
    per_device, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    trained = per_device * accumulated * ranks
    if selection.budget != trained:
        raise UserError(
            f"SelectionConfig.budget is {selection.budget}, but the trainer trains on {trained} examples a step "
            f"(per_device_train_batch_size {per_device} x gradient_accumulation_steps {accumulated} x {ranks} "
            f"process(es)): make them equal"
        )
    batches = accumulated * ranks
    if selection.candidates % batches:
        raise UserError(
            f"SelectionConfig.candidates is {selection.candidates}, which {ranks} process(es) with {accumulated} "
            f"batch(es) each cannot share evenly: give a multiple of {batches}"
        )
    return selection.candidates // batches


def optimizer_of(args: TrainingArguments) -> dict[str, object]:
    """What the selection must know of the optimizer, as options of `TrainConfig`.

    Raises:
        UserError: The selection does not know it.
    """
    name = args.optim.value if hasattr(args.optim, "value") else str(args.optim)
    short = next((name.removesuffix(f"_{how}") for how in _HOW if name.endswith(f"_{how}")), name)
    if short not in _OPTIMIZERS:
        raise UserError(
            f"optim {name!r} is not known to the selection, which compares candidates by the update that the optimizer "
            f"would make of each: give adamw_torch (or another adamw), sgd, lion_32bit or adafactor"
        )
    momentum = 0.0 if short == "sgd" else args.adam_beta1
    epsilon = 1e-8 if short == "adafactor" else args.adam_epsilon
    return {"optimizer": _OPTIMIZERS[short], "betas": (momentum, args.adam_beta2), "adam_epsilon": epsilon}


def check_arguments(trainer: Trainer) -> None:
    """Whether the loop leaves loss and batches to the coreset.

    Raises:
        UserError: Names the argument that does not, and the way out.
    """
    args, model = trainer.args, trainer.model
    loader = args.accelerator_config
    assert isinstance(loader, AcceleratorConfig)
    text = base_of(model).config.get_text_config() if isinstance(model, CausalModel) else None
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = [getattr(parallel, f"{kind}_size", 1) for kind in ("tp", "cp", "sp")] if parallel else []
    refused = {
        "packing=True (of TRL) puts examples of several sources in one row: set it to False; coresets are packed after "
        "they are selected": getattr(args, "packing", False),
        f"loss_type={getattr(args, 'loss_type', None)!r} (of TRL) is not the coreset's loss: leave it out": (
            getattr(args, "loss_type", None) not in (None, "nll", "chunked_nll")
        ),
        "label_smoothing_factor is not known to the coreset's loss: leave it out": args.label_smoothing_factor,
        "auto_find_batch_size changes what a step trains on: leave it out": args.auto_find_batch_size,
        "train_sampling_strategy='batch_rebalance' deals out micro-batches, as the coreset does: leave it out": (
            getattr(args, "train_sampling_strategy", None) == "batch_rebalance"
        ),
        "accelerator_config split_batches=True cuts the loader's batches: leave it out": (
            loader.split_batches
        ),
        "accelerator_config dispatch_batches=True sends collated batches, and candidates are not collated: set it to "
        "False": loader.dispatch_batches,
        "several GPUs in one process (DataParallel) are not supported: start with torchrun or accelerate launch": (
            args.n_gpu > 1
        ),
        "tensor, context and sequence parallelism are not supported: leave parallelism_config out": (
            any(size > 1 for size in sizes)
        ),
        "the model's auxiliary loss (output_router_logits) would be left out: switch it off": (
            getattr(text, "output_router_logits", False)
        ),
    }
    for what, is_so in refused.items():
        if is_so:
            raise UserError(f"{what}")
