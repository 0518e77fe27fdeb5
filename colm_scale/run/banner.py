"""The lines printed before the first step of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft import PeftConfig
from torch import Tensor
from transformers import PretrainedConfig

from colm_scale.checkpoint.files import NO_CHECKPOINT, Checkpoint
from colm_scale.config import LoraConfig, RunConfig, SelectionConfig
from colm_scale.data.examples import count_lines
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.engines.tensors import held_bytes
from colm_scale.modeling.multimodal import not_loaded_line
from colm_scale.modeling.targets import adapted_line
from colm_scale.reporting.summary import gib
from colm_scale.run.evaluate import Evaluator
from colm_scale.run.inputs import Inputs
from colm_scale.selection.quota import expected_share
from colm_scale.selection.shares import shares_facts
from colm_scale.sketch.zeroth_order import PERTURBATION


def run_lines(config: RunConfig, inputs: Inputs, engine: Engine, evaluator: Evaluator, group: Group) -> list[str]:
    """Describe the run: model, engine, data, method, warnings, and what is left out of the data."""
    selection = config.selection
    attention = engine.module.causal_model.config._attn_implementation
    lines = [
        f"model {config.model.name or 'built-in base'} in {config.train.dtype}, attention {attention}, engine "
        f"{engine.name} on {group.world_size} rank(s), {group.device.type}; {gib(held_bytes(engine.module))} GiB of "
        f"weights on rank 0",
        *([f"micro-batches are padded: {why}"] if (why := engine.module.padded_because) else []),
        *([f"attention runs in sdpa: {why}"] if (why := engine.module.sdpa_because) else []),
        *([line] if (line := not_loaded_line(engine.module.causal_model)) else []),
        adapted_line(engine.module.causal_model),
        *continued_lines(config.lora),
        *router_lines(engine.module.causal_model.config),
        f"{int(inputs.sizes.sum()):,} examples of {len(inputs.source_names)} sources",
        _method_line(selection, inputs),
        *kept_lines(selection, inputs.source_names, inputs.sizes, inputs.kept, inputs.protected),
        *update_lines(config),
        *rounding_lines(config),
        *shares_facts(selection, inputs.source_names, inputs.sizes, inputs.kept),
    ]
    if not config.checkpoint.every:
        lines.append("warning: --checkpoint.every 0: an interrupted run is lost")
    lines += [*count_lines(inputs.sampler.counts), *inputs.notes]
    for what, counts in evaluator.left_out.items():
        if counts:
            by_source = ", ".join(f"{name} {count}" for name, count in counts.items())
            lines.append(f"{what}: {sum(counts.values())} ({by_source})")
    return lines


def continued_lines(config: LoraConfig) -> list[str]:
    """Name the options that have no effect, because an adapter to start from brings its own values."""
    if config.adapter is None:
        return []
    own, default = PeftConfig.from_pretrained(config.adapter), LoraConfig()
    its = {"rank": own.r, "alpha": own.lora_alpha, "use_rslora": own.use_rslora, "dropout": own.lora_dropout}
    its["targets"] = sorted(own.target_modules) if isinstance(own.target_modules, set) else own.target_modules
    given = {name: getattr(config, name) for name in its if getattr(config, name) != getattr(default, name)}
    return [
        f"warning: --lora.{name} {value} has no effect: {config.adapter} goes on with its own, {its[name]}"
        for name, value in given.items()
        if (sorted(value) if isinstance(value, list) else value) != its[name]
    ]


def router_lines(model: PretrainedConfig) -> list[str]:
    """Say that the auxiliary loss of a mixture of experts, if its configuration asks for it, is left out."""
    if not getattr(model.get_text_config(), "output_router_logits", False):
        return []
    return ["the model's auxiliary loss of its router (output_router_logits) is not part of the loss"]


def start_line(seconds: Mapping[str, float]) -> str:
    """Describe the time that it took from the start of the process until now, by part."""
    parts = ", ".join(f"{part} {taken:.1f}" for part, taken in seconds.items())
    return f"started in {sum(seconds.values()):.1f} s: {parts}"


def resumed_lines(found: Checkpoint, done: int) -> list[str]:
    """Name the checkpoint from which the run resumes, and damaged ones that were skipped."""
    if found is NO_CHECKPOINT:
        return []
    skipped = [f"warning: checkpoint skipped: {damage}" for damage in found.passed_over]
    return [*skipped, f"resuming after step {done}, from {found.path}"]


def _method_line(selection: SelectionConfig, inputs: Inputs) -> str:
    if inputs.record:
        return f"method replay: the selections of {inputs.record.file}, {inputs.record.steps} steps"
    trained = selection.candidates if selection.method == "full" else selection.budget
    return f"method {selection.method}: {trained} of {selection.candidates} candidates per step"


def kept_lines(
    selection: SelectionConfig, names: Sequence[str], sizes: Tensor, kept: Tensor, protected: Tensor
) -> list[str]:
    """Name kept sources and protected examples, say what they take of a coreset, and warn if that is more than all.

    Args:
        names: ``[Q]`` sources.
        sizes: ``[Q]`` training examples of each source.
        kept: ``[Q]`` bool.
        protected: ``[Q]`` protected examples of each source.
    """
    by_source = ", ".join(f"{name} {count:,}" for name, count in zip(names, protected.tolist()) if count)
    marked = [f"protected examples: {int(protected.sum()):,} ({by_source})"] if by_source else []
    if selection.method == "random":
        return [f"{line}; --selection.method random does not protect them" for line in marked]
    if selection.method in ("full", "replay"):
        return []
    if selection.coverage_floor:
        marked.append(f"coverage floor: {selection.coverage_floor:.0%} of each source's candidates, in every pass")
    names_kept = [name for name, is_kept in zip(names, kept.tolist()) if is_kept]
    lines = [f"kept sources ({len(names_kept)}): {', '.join(names_kept) or 'none'}", *marked]
    of_examples = int(sizes[kept].sum()) / int(sizes.sum())
    limits = selection.candidates, selection.budget, selection.coverage_floor
    share = expected_share(sizes, kept, protected, *limits)
    if names_kept:
        of_coreset = share * of_examples * selection.candidates / selection.budget
        lines[0] += f"; {of_examples:.0%} of the examples, and about {of_coreset:.0%} of a coreset"
    if share < 1:
        what = "kept and protected candidates" if by_source else "candidates of kept sources"
        rest = "" if selection.coverage_floor else ", and next to none of the others"
        lines.append(
            f"warning: only about {share:.0%} of the {what} fit into the budget of an average step{rest}: increase "
            f"--selection.budget, draw fewer --selection.candidates, or keep less (--selection.kept_sources)"
        )
    return lines


def update_lines(config: RunConfig) -> list[str]:
    """Warn if the optimizer's update leaves next to no difference between candidates."""
    selection, optimizer = config.selection, config.train.optimizer
    one_probe = selection.estimator == "zeroth_order" and selection.num_probes == 1
    if selection.method != "colm" or not one_probe or optimizer not in ("lion", "muon"):
        return []
    return [
        f"warning: with one probe, the update of --train.optimizer {optimizer} depends only on the sign of the "
        f"derivative, so most candidates look alike: increase --selection.num_probes, or use --selection.estimator "
        f"last_layer"
    ]


def rounding_lines(config: RunConfig) -> list[str]:
    """Warn if finite differences of the loss are mostly rounding."""
    selection, quantize, dtype = config.selection, config.model.quantize, config.train.dtype
    differences = selection.method == "colm" and selection.estimator == "zeroth_order"
    if not differences or dtype == "float32" or quantize == "none":
        return []
    return [
        f"warning: with --model.quantize {quantize} in {dtype}, finite differences of step {PERTURBATION:g} are mostly "
        f"rounding: use --train.dtype float32, or --selection.estimator last_layer"
    ]
