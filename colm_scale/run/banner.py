"""What is told before the first step about a run as a whole."""

from __future__ import annotations

from colm_scale.checkpoint.store import Checkpoint
from colm_scale.config import RunConfig
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.engines.shards import held_bytes
from colm_scale.reporting.facts import kept_facts, method_fact, rounding_facts, update_facts
from colm_scale.reporting.summary import gib
from colm_scale.run.evaluate import HeldOutEvaluator, NoEvaluator
from colm_scale.run.inputs import Inputs
from colm_scale.selection.shares import shares_facts


def resumed_facts(found: Checkpoint | None, done: int) -> list[str]:
    """Where a run goes on from, and which checkpoints it passed over."""
    if found is None:
        return []
    passed_over = [f"warning: passed over: {damage}" for damage in found.passed_over]
    return [*passed_over, f"going on after step {done}, from {found.path}"]


def run_facts(
    config: RunConfig, inputs: Inputs, engine: Engine, evaluator: HeldOutEvaluator | NoEvaluator, group: Group
) -> list[str]:
    """Lines printed before the first step."""
    selection = config.selection
    attention = engine.module.causal_model.config._attn_implementation
    facts = [
        f"model {config.model.name or 'built-in base'} in {config.train.dtype}, attention {attention}, engine "
        f"{engine.name} on {group.world_size} rank(s), {group.device.type}; {gib(held_bytes(engine.module))} GiB of "
        f"weights on rank 0",
        *([f"micro-batches are padded: {why}"] if (why := engine.module.padded_because) else []),
        f"{int(inputs.sizes.sum()):,} examples of {len(inputs.source_names)} sources",
        method_fact(selection, inputs.record),
        *kept_facts(selection, inputs.source_names, inputs.sizes, inputs.kept, inputs.protected),
        *update_facts(config),
        *rounding_facts(config),
        *shares_facts(selection, inputs.source_names, inputs.sizes, inputs.kept),
    ]
    if not config.checkpoint.every:
        facts.append("warning: --checkpoint.every 0: a run that is interrupted is lost")
    left_out = {
        "training examples too long, dropped": inputs.sampler.dropped,
        "training examples too long, cut": inputs.sampler.cut,
    }
    if inputs.eval is not None:
        left_out |= {
            "held-out examples too long, dropped": inputs.eval.dropped,
            "held-out examples too long, cut": inputs.eval.cut,
            "held-out examples above --eval.limit, not evaluated": evaluator.left_out,
        }
    for what, counts in left_out.items():
        if counts:
            by_source = ", ".join(f"{name} {count}" for name, count in counts.items())
            facts.append(f"{what}: {sum(counts.values())} ({by_source})")
    return facts


def written_down(config: RunConfig, inputs: Inputs, steps: int) -> dict[str, object]:
    """What a checkpoint and ``run.json`` say about the run."""
    return {
        "schedule": {"steps": steps, "learning_rate": config.train.learning_rate, "kind": config.train.schedule},
        "random": {"seed": config.train.seed, "draws": "functions of seed, purpose and index"},
        "sources": inputs.source_table,
        "rows_digest": inputs.rows_digest,
    }
