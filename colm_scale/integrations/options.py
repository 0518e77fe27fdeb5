"""Options of a run, and arguments of a trainer, that a selection in another library's training loop can follow."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from colm_scale.config import RunConfig, SelectionConfig
from colm_scale.errors import UserError
from colm_scale.modeling.causal import CausalModel, base_of

if TYPE_CHECKING:
    from transformers import Trainer

LOOP = ("train.seed", "train.optimizer", "train.betas", "train.adam_epsilon")
"""Options that the selection shares with the training loop."""
_USED = (
    *("data.columns.source", "data.columns.protected", "sources.refresh_every"),
    *("train.micro_batch_tokens", "train.loss", "train.packing"),
)

_OPTIMIZERS = {
    "adamw": "adamw",
    "paged_adamw": "adamw",
    "adam": "adamw",
    "sgd": "sgd",
    "lion": "lion",
    "paged_lion": "lion",
    "adafactor": "adafactor",
}
"""``--train.optimizer`` by the trainer's name for one, without its implementation (`_IMPLEMENTATIONS`)."""
_IMPLEMENTATIONS = (
    *("torch_fused", "torch_8bit", "torch_4bit", "torch_xla", "torch_npu_fused", "torch"),
    *("32bit", "8bit", "bnb_8bit"),
)


def as_run(coreset: SelectionConfig | RunConfig, also_used: tuple[str, ...] = ()) -> RunConfig:
    """The resolved configuration of a selection.

    Args:
        coreset: A selection alone; or a run, in which other options may be set if they have an effect here.
        also_used: Names of further options that have an effect.

    Raises:
        UserError: An option that has no effect here is set.
    """
    run = RunConfig(selection=coreset) if isinstance(coreset, SelectionConfig) else coreset
    for name, value, default in _options(run):
        used = name.startswith("selection.") or name in (*_USED, *also_used)
        if value != default and not used:
            raise UserError(f"{name}={value!r} has no effect here, where another library trains: leave it out")
    return dataclasses.replace(run, selection=run.selection.resolved())


def _options(run: RunConfig) -> list[tuple[str, object, object]]:
    """Name, value and default of every option; each entry of ``data.columns`` counts as an option."""
    found, defaults = [], RunConfig()
    for section in dataclasses.fields(run):
        value, default = getattr(run, section.name), getattr(defaults, section.name)
        if not dataclasses.is_dataclass(value):
            found.append((section.name, value, default))
            continue
        names = [field.name for field in dataclasses.fields(value) if field.name != "columns"]
        found += [(f"{section.name}.{name}", getattr(value, name), getattr(default, name)) for name in names]
    found += [(f"data.columns.{role}", column, role) for role, column in run.data.columns.items()]
    return found


def loader_batch(selection: SelectionConfig, args: TrainingArguments, ranks: int) -> int:
    """The number of candidates in each batch of the trainer's loader.

    Raises:
        UserError: The budget is not what the trainer trains on in a step, or the candidates cannot be split evenly.
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
            f"batch(es) each cannot share evenly: use a multiple of {batches}"
        )
    return selection.candidates // batches


def optimizer_of(args: TrainingArguments) -> dict[str, object]:
    """The trainer's optimizer as options of `TrainConfig`.

    Raises:
        UserError: The selection does not know it.
    """
    name = args.optim.value if hasattr(args.optim, "value") else str(args.optim)
    short = next((name.removesuffix(f"_{how}") for how in _IMPLEMENTATIONS if name.endswith(f"_{how}")), name)
    if short not in _OPTIMIZERS:
        raise UserError(
            f"optim {name!r} is not known to the selection, which compares candidates by the optimizer's update: use "
            f"adamw_torch (or another adamw), sgd, lion_32bit or adafactor"
        )
    momentum = 0.0 if short == "sgd" else args.adam_beta1
    epsilon = 1e-8 if short == "adafactor" else args.adam_epsilon
    return {"optimizer": _OPTIMIZERS[short], "betas": (momentum, args.adam_beta2), "adam_epsilon": epsilon}


def check_arguments(trainer: Trainer) -> None:
    """Refuse arguments that would change the loss or the batches of the coreset.

    Raises:
        UserError: Names the argument and the way out.
    """
    args, model = trainer.args, trainer.model
    loader = args.accelerator_config
    assert isinstance(loader, AcceleratorConfig)
    text = base_of(model).config.get_text_config() if isinstance(model, CausalModel) else None
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    loss_type = getattr(args, "loss_type", None)
    refused = {
        "packing=True (of TRL) puts examples of several sources in one row: set it to False; coresets are packed after "
        "they are selected": getattr(args, "packing", False),
        f"loss_type={loss_type!r} (of TRL) is not the coreset's loss: leave it out": (
            loss_type not in (None, "nll", "chunked_nll")
        ),
        "label_smoothing_factor is not known to the coreset's loss: leave it out": args.label_smoothing_factor,
        "auto_find_batch_size changes the number of examples per step: leave it out": args.auto_find_batch_size,
        "train_sampling_strategy='batch_rebalance' would rebalance the coreset's micro-batches again: leave it out": (
            getattr(args, "train_sampling_strategy", None) == "batch_rebalance"
        ),
        "accelerator_config split_batches=True splits the loader's batches: leave it out": loader.split_batches,
        "accelerator_config dispatch_batches=True sends collated batches, and candidates are not collated: set it to "
        "False": loader.dispatch_batches,
        "several GPUs in one process (DataParallel) are not supported: start with torchrun or accelerate launch": (
            args.n_gpu > 1
        ),
        "tensor, context and sequence parallelism are not supported: leave parallelism_config out": (
            any(getattr(parallel, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp"))
        ),
        "the model's auxiliary loss (output_router_logits) would be left out: switch it off": (
            getattr(text, "output_router_logits", False)
        ),
    }
    for message, applies in refused.items():
        if applies:
            raise UserError(message)
