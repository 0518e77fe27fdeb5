"""CoLM in transformers' ``Trainer`` and its subclasses, such as TRL's ``SFTTrainer``.

The trainer's own loop runs. For each optimizer step it calls `get_batch_samples`, which reads candidates from the
loader and returns the coreset, in the number of micro-batches that the loop expects.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from colm_scale import __version__
from colm_scale.checkpoint.identity import check_same_run, config_facts
from colm_scale.checkpoint.selection_state import Files
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.config import RunConfig, SelectionConfig, TrainConfig, as_yaml
from colm_scale.data.examples import Examples
from colm_scale.distributed.connect import connect
from colm_scale.errors import UserError
from colm_scale.integrations.candidates import CandidateCollator, Columns, count_sources, numbered
from colm_scale.integrations.options import as_run, check_arguments, loader_batch, optimizer_of
from colm_scale.integrations.reports import Reports
from colm_scale.integrations.selector import Coreset, CoresetSelector
from colm_scale.records import Json, MicroBatch, StepReport
from colm_scale.reporting.environment import environment
from colm_scale.reporting.run_directory import RunDirectory

_CORESET = "coreset"
"""Name of a micro-batch among the loop's inputs, and of the folder in checkpoints and in the output."""

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_utils import TrainOutput
else:
    Trainer = object  # a subclass names its trainer after the mixin


class CoresetTrainerMixin(Trainer):
    """Makes a trainer train on coresets; name it before ``Trainer`` or ``SFTTrainer`` among the bases of a class.

    ``per_device_train_batch_size`` and ``gradient_accumulation_steps`` still describe the trained examples; the
    loader's batches are larger by ``coreset.candidates / coreset.budget``.

    Args:
        coreset: The options of the selection; or a run's, of which ``selection``, ``data.columns`` (source and
            protected), ``sources.refresh_every``, ``train.micro_batch_tokens``, ``train.loss``, ``train.packing`` and
            ``output_dir`` (of reports) have an effect.
        sources: Training examples of each source, by name; by default counted, which a stream does not allow.

    Raises:
        UserError: The trainer's arguments contradict the selection or are not supported.
    """

    loss_is_scaled_for_ga = True  # the weights add up to 1 over all micro-batches and ranks

    def __init__(
        self,
        *args: object,
        coreset: SelectionConfig | RunConfig,
        sources: Mapping[str, int] | None = None,
        **kwargs: object,
    ):
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        if callable(given.arguments.get("compute_loss_func")):
            raise UserError("compute_loss_func would not be called, the coreset has its own loss: leave it out")
        if given.arguments.get("train_dataset") is not None:
            given.arguments["train_dataset"] = numbered(given.arguments["train_dataset"])
        run = as_run(coreset, ("output_dir",))
        super().__init__(*given.args, **given.kwargs)
        check_arguments(self)
        sources = sources or count_sources(self.train_dataset, run.data.column("source"))
        self._coresets = _Coresets(self, run, dict(sources))  # the only attribute added to the trainer
        self.add_callback(self._coresets)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: object, **kwargs: object) -> TrainOutput:
        """Train as the trainer does, and restore the state of the selection when resuming."""
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._coresets.resumed = Path(found) if found else None
        train: Callable[..., TrainOutput] = super().train
        return train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Examples]:
        """The trainer's loader with larger batches, whose rows keep their source and id."""
        with _loading_candidates(self, self._coresets):
            return super().get_train_dataloader()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Examples], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, object]], None]:
        """Select a coreset from the next batches; return it in the same number of micro-batches."""
        parts = list(islice(epoch_iterator, num_batches))
        if not parts:
            return [], None
        assert self.optimizer is not None
        rate = self.optimizer.param_groups[0]["lr"]
        coreset = self._coresets.select(parts, self.state.global_step + 1, rate)
        return [_as_inputs(micro_batch) for micro_batch in coreset.micro_batches], None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch. Its loss is not divided by the number of micro-batches, as releases of transformers
        without `loss_is_scaled_for_ga` would do."""
        steps, self.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps, 1
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.current_gradient_accumulation_steps = steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Json,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        """The coreset's loss, through whatever wraps the model; the trainer's own in evaluation."""
        if _CORESET not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self._coresets.loss(inputs[_CORESET], model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the selection to the trainer's training logs."""
        if "loss" in logs:
            logs |= self._coresets.reports.take()
        super().log(logs, start_time)


class _Coresets(TrainerCallback):
    """The selection's side of a trainer, apart from the trainer's own attributes.

    Attributes:
        run: All options, including those that the trainer decides.
        columns: The columns with source and protection.
        loader_batch: Candidates in a batch of the loader.
        resumed: The trainer's checkpoint to resume from.
        reports: Reports of the current training.
    """

    reports: Reports

    def __init__(self, trainer: CoresetTrainerMixin, run: RunConfig, sources: dict[str, int]):
        self._trainer, self._sources = trainer, sources
        args = trainer.args
        self._group = dataclasses.replace(connect(), device=args.device)
        self.loader_batch = loader_batch(run.selection, args, self._group.world_size)
        train = dataclasses.asdict(run.train) | optimizer_of(args) | {"seed": args.seed}
        self.run = dataclasses.replace(run, train=TrainConfig(**train))
        self.columns = Columns(run.data.column("source"), run.data.column("protected"), tuple(sorted(sources)))
        self.resumed: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Make the selector for the prepared model."""
        accelerator = self._trainer.accelerator
        model = accelerator.unwrap_model(self._trainer.model_wrapped, keep_torch_compile=False)
        config = dataclasses.replace(self.run, output_dir=None)
        self._selector = CoresetSelector(model, config, self._sources, self._group)
        if self.resumed is not None:
            self._load(self.resumed / _CORESET)
        self.reports = Reports(self._writer(str(accelerator.distributed_type), state.global_step))

    def select(self, parts: list[Examples], step: int, learning_rate: float) -> Coreset:
        """Select the coreset of a step, in one micro-batch per part."""
        self._current = self._selector.select(parts, step=step, micro_batches=len(parts), learning_rate=learning_rate)
        return self._current

    def loss(self, micro_batch: MicroBatch, model: nn.Module) -> Tensor:
        """A micro-batch's loss, times the number of ranks, because their gradients are averaged."""
        return self._selector.loss(micro_batch, through=model) * self._group.world_size

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Report the step after the optimizer."""
        report = self._selector.finish(applied=not self._trainer.accelerator.optimizer_step_was_skipped)
        assert report is not None
        self.reports.add(report, self._current.dropped)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Save the state of the selection in the trainer's checkpoint."""
        step, selection = state.global_step, self._selector.state
        facts = {"step": step, "run": self._identity(), "moment_steps": selection.moment_steps}
        facts["written_by"] = {"colm_scale": __version__, "ranks": self._group.world_size}
        tensors = selection.tensors(step)
        folder = _output_dir(args) / f"{PREFIX_CHECKPOINT_DIR}-{step}" / _CORESET
        with self._group.together():
            if self._group.is_first:
                CheckpointFolder(folder, keep=1).write(step, facts, tensors)

    def _writer(self, engine: str, done: int) -> Callable[[StepReport], None]:
        """On the first rank, create the run directory and return its writer of reports."""
        with self._group.together():
            if self._group.is_first:
                path = self.run.output_dir or str(_output_dir(self._trainer.args) / _CORESET)
                directory = RunDirectory(path, resume=True)  # replaces what an earlier training left there
                meter = self._selector.meter
                facts = {"device_name": meter.device_name, "memory": meter.label}
                found = environment(self._group.device, self._group.world_size, engine, **facts)
                directory.create(as_yaml(self.run), found, done)
                return partial(directory.report, source_names=self._selector.names)
        return lambda report: None

    def _load(self, folder: Path) -> None:
        steps: int = 0
        tensors: Files = {}
        with self._group.together():
            if self._group.is_first:
                found = CheckpointFolder(folder, keep=1).newest(fallback=False)
                if found is None:
                    raise UserError(
                        f"{folder.parent} was not saved by a trainer with coresets ({folder.name} is empty): resume "
                        f"with the trainer that saved it, or start a new training from its adapter"
                    )
                check_same_run(found.state["run"], self._identity(), found.path)
                steps, tensors = found.state["moment_steps"], found.tensors
        self._selector.state.put_back(self._group.share_json(steps), tensors)

    def _identity(self) -> dict[str, object]:
        """The facts that must not change when a training resumes; the trainer checks its own."""
        sources = ", ".join(f"{name} {count}" for name, count in sorted(self._sources.items()))
        return {"config": config_facts(self.run), "data": sources, "model": ""}


def _output_dir(args: TrainingArguments) -> Path:
    assert args.output_dir is not None  # it has a default
    return Path(args.output_dir)


@contextmanager
def _loading_candidates(trainer: CoresetTrainerMixin, coresets: _Coresets) -> Iterator[None]:
    """A context in which the trainer's training loader collates candidates."""
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns is not None
    loading = trainer.accelerator.dataloader_config
    ours = {
        "data_collator": CandidateCollator(trainer.data_collator, coresets.columns),
        "_train_batch_size": coresets.loader_batch,
        "_signature_columns": [*trainer._signature_columns, *coresets.columns.all],
    }
    with ExitStack() as put_back:
        # Otherwise the first rank would read a stream for all, and send tensors only.
        for owner, name, value in [(loading, "dispatch_batches", False), *[(trainer, *item) for item in ours.items()]]:
            put_back.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def _as_inputs(micro_batch: MicroBatch) -> dict[str, object]:
    """A micro-batch as inputs for the trainer's loop, which counts their tokens."""
    batch = micro_batch.batch
    found: dict[str, Tensor | object] = {"input_ids": batch.input_ids, _CORESET: micro_batch}
    return found if batch.attention_mask is None else found | {"attention_mask": batch.attention_mask}
