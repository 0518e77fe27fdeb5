"""CoLM in transformers' ``Trainer`` and what is made of it, such as TRL's ``SFTTrainer``.

The trainer's own loop runs. It asks `get_batch_samples` for the micro-batches of an optimizer step: here its loader has
given so many candidates, and the coreset comes back in as many micro-batches as the loop counts.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from colm_scale import __version__
from colm_scale.checkpoint.identity import check_same_run, config_facts
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.config import RunConfig, SelectionConfig, TrainConfig, as_yaml
from colm_scale.distributed.group import connect
from colm_scale.errors import UserError
from colm_scale.integrations.candidates import CandidateCollator, Columns, count_sources, numbered
from colm_scale.integrations.options import as_run
from colm_scale.integrations.reports import Reports
from colm_scale.integrations.selector import Coreset, CoresetSelector
from colm_scale.integrations.support import check_arguments, loader_batch, optimizer_of
from colm_scale.reporting.environment import environment
from colm_scale.reporting.run_directory import RunDirectory

_CORESET = "coreset"
"""Under this name a micro-batch travels through the trainer's loop; its folder in checkpoints and output."""


class CoresetTrainerMixin:
    """Before ``Trainer``, or ``SFTTrainer``, among the bases of a class: trains on coresets of the batches.

    ``per_device_train_batch_size`` and ``gradient_accumulation_steps`` say, as ever, what is trained on; the loader
    gives as many times more as ``coreset.candidates`` are more than ``coreset.budget``.

    Args:
        coreset: The options of the selection; or a run's, of which ``selection``, ``data.source_column``,
            ``data.protected_column``, ``train.micro_batch_tokens``, ``train.loss``, ``train.packing`` and
            ``output_dir`` (of reports) count.
        sources: Training examples of each source, by name; counted where that is possible.

    Raises:
        UserError: The trainer's arguments contradict the selection, or cannot be followed.
    """

    loss_is_scaled_for_ga = True  # by the weights, which add up to 1 over all micro-batches and ranks

    def __init__(
        self,
        *args: object,
        coreset: SelectionConfig | RunConfig,
        sources: Mapping[str, int] | None = None,
        **kwargs: object,
    ):
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        if given.arguments.get("compute_loss_func") is not None:
            raise UserError("compute_loss_func is not called, for the loss is that of the coreset: leave it out")
        if given.arguments.get("train_dataset") is not None:
            given.arguments["train_dataset"] = numbered(given.arguments["train_dataset"])
        config = as_run(coreset, ("output_dir",))
        super().__init__(*given.args, **given.kwargs)
        check_arguments(self)
        self._group = dataclasses.replace(connect(), device=self.args.device)
        self._loader_batch = loader_batch(config.selection, self.args, self._group.world_size)
        train = dataclasses.asdict(config.train) | optimizer_of(self.args) | {"seed": self.args.seed}
        self._run = dataclasses.replace(config, train=TrainConfig(**train))
        self._sources = dict(sources or count_sources(self.train_dataset, config.data.source_column))
        self._selector: CoresetSelector | None = None
        self._coreset: Coreset | None = None
        self._resumed: str | None = None
        self.add_callback(_Steps(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: object, **kwargs: object):
        """As the trainer's own; what the selection has learned goes on too."""
        self._resumed = resume_from_checkpoint or None
        if resume_from_checkpoint is True:
            self._resumed = get_last_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self):
        """The trainer's own loader, of larger batches, whose rows keep their source and id."""
        with self._of_candidates():
            return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The coreset of the next batches, in as many micro-batches."""
        parts = list(islice(epoch_iterator, num_batches))
        if not parts:
            return [], None
        rate = self.optimizer.param_groups[0]["lr"]
        step = self.state.global_step + 1
        self._coreset = self._selector.select(parts, step=step, micro_batches=len(parts), learning_rate=rate)
        return [_as_inputs(micro_batch) for micro_batch in self._coreset.micro_batches], None

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: object):
        """That of the coreset, through whatever wraps the model; in evaluation the trainer's own."""
        if _CORESET not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        # Whatever trains on several ranks averages their gradients.
        return self._selector.loss(inputs[_CORESET], through=model) * self._group.world_size

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """With what is to be said about the selection, where the trainer says something about its training."""
        if "loss" in logs and self._selector is not None:
            logs |= self._reports.take()
        super().log(logs, *args, **kwargs)

    @contextmanager
    def _of_candidates(self) -> Iterator[None]:
        """A block in which the trainer makes its training loader."""
        data = self._run.data
        columns = Columns(data.source_column, data.protected_column, tuple(sorted(self._sources)))
        self._set_signature_columns_if_needed()
        loading = self.accelerator.dataloader_config
        before = self.data_collator, self._train_batch_size, self._signature_columns, loading.dispatch_batches
        self.data_collator = CandidateCollator(self.data_collator, columns)
        self._train_batch_size = self._loader_batch
        self._signature_columns = [*self._signature_columns, *columns.all]
        loading.dispatch_batches = False  # else a stream is read by the first rank, which sends tensors only
        try:
            yield
        finally:
            self.data_collator, self._train_batch_size, self._signature_columns, loading.dispatch_batches = before

    def _begin(self, done: int) -> None:
        """The model is prepared, and ``done`` steps have been made: the selection can be."""
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        config = dataclasses.replace(self._run, output_dir=None)
        self._selector = CoresetSelector(model, config, self._sources, self._group)
        if self._resumed is not None:
            self._load(Path(self._resumed) / _CORESET)
        self._selector.step = done
        directory = None
        with self._group.together():
            if self._group.is_first:
                path = self._run.output_dir or str(Path(self.args.output_dir) / _CORESET)
                directory = RunDirectory(path, resume=True)  # what an earlier training has left there gives way
                engine = str(self.accelerator.distributed_type)
                facts = {"device_name": self._selector.meter.device_name, "memory": self._selector.meter.label}
                found = environment(self._group.device, self._group.world_size, engine, **facts)
                directory.create(as_yaml(self._run), found, done)
        self._reports = Reports(directory, self._selector.names)

    def _end_step(self) -> None:
        report = self._selector.finish()
        if report is not None:
            self._reports.add(report, self._coreset.dropped)

    def _save(self, folder: Path, step: int) -> None:
        state = {"step": step, "run": self._identity(), "moment_steps": self._selector.state.moment_steps}
        state["written_by"] = {"colm_scale": __version__, "ranks": self._group.world_size}
        tensors = self._selector.state.tensors(step)
        with self._group.together():
            if self._group.is_first:
                CheckpointFolder(folder, keep=1).write(step, state, tensors)

    def _load(self, folder: Path) -> None:
        found = None
        with self._group.together():
            if self._group.is_first:
                found = CheckpointFolder(folder, keep=1).newest(fallback=False)
                if found is None:
                    raise UserError(
                        f"{folder.parent} was not saved by a trainer with coresets ({folder.name} holds nothing): go "
                        f"on with the trainer that saved it, or begin anew with its adapter"
                    )
                check_same_run(found.state["run"], self._identity(), found.path)
        steps = self._group.share_json(None if found is None else found.state["moment_steps"])
        self._selector.state.put_back(steps, None if found is None else found.tensors)

    def _identity(self) -> dict[str, object]:
        """What must be the same in a training that goes on; the rest is the trainer's to check."""
        sources = ", ".join(f"{name} {count}" for name, count in sorted(self._sources.items()))
        return {"config": config_facts(self._run), "data": sources, "model": ""}


class _Steps(TrainerCallback):
    """Tells the trainer it belongs to where its loop is."""

    def __init__(self, trainer: CoresetTrainerMixin):
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object):
        self._trainer._begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object):
        self._trainer._end_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / _CORESET
        self._trainer._save(folder, state.global_step)


def _as_inputs(micro_batch) -> dict[str, object]:
    """A micro-batch as the trainer's loop passes it on and counts its tokens."""
    batch = micro_batch.batch
    found: dict[str, Tensor | object] = {"input_ids": batch.input_ids, _CORESET: micro_batch}
    return found if batch.attention_mask is None else found | {"attention_mask": batch.attention_mask}
