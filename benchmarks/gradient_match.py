"""Nearness of the coreset's gradient over all adapters to that of all candidates, for every estimator and ranking.

python benchmarks/gradient_match.py       the built-in base and mixture, before training and after 40 steps
python benchmarks/gradient_match.py --model FOLDER --data F.jsonl --steps 0 --pool 512 -- --train.dtype bfloat16

Computes the exact gradient of every example of a pool, and all inner products, which give the gradient of any
weighting of any examples. In each draw, every way to select picks 64 of the same 128 candidates with the product's own
estimators and rules; its moments are updated between draws, while the weights stay. Sketches are cached, since they are
equal in every draw. Options after -- go to the product. Rows are appended to benchmarks/results/gradient_match.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import arms
import rows
import torch
from adapter_tap import AdapterTap
from arms import LOSS
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from colm_scale.config import command_line as arguments
from colm_scale.data.batching import collate
from colm_scale.distributed.connect import connect
from colm_scale.engines.choose import loading_device, make_engine
from colm_scale.errors import UserError
from colm_scale.estimators.make import make_estimator
from colm_scale.profiling.memory import memory_meter
from colm_scale.profiling.spans import Spans
from colm_scale.randomness import generator
from colm_scale.records import Batch, Candidates
from colm_scale.run import assemble as assembly
from colm_scale.run.inputs import read_inputs
from colm_scale.run.prepare import resolve
from colm_scale.run.schedule import learning_rate
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.route import form_micro_batches
from colm_scale.selection.rule import SelectionRule, loss_shares
from colm_scale.selection.shares import source_shares
from colm_scale.sketch.plan import plan_sketch
from colm_scale.sketch.tap import Tap

CANDIDATES, BUDGET = 128, 64
WARM_UP = 10
"""Draws that only update the moments."""
MOST_NUMBERS = 2**30
"""Numbers of gradients held at a time, 4 GiB; larger adapters are processed in parts."""
BUILT_IN, REFERENCE = "built-in", "stratified"
ESTIMATORS: Mapping[str, dict[str, Any]] = {
    "zeroth_order, K=1": {"estimator": "zeroth_order", "num_probes": 1},
    "zeroth_order, K=16": {"estimator": "zeroth_order", "num_probes": 16},
    "last_layer, columns": {"estimator": "last_layer", "compression": "columns"},
    "last_layer, countsketch": {"estimator": "last_layer", "compression": "countsketch"},
    "loss": {"estimator": LOSS},
    "length": {"estimator": "length"},
}
RANKINGS = {
    **{ranking: ranking for ranking in ("facility", "matching", "systematic")},
    **{ranking: arms.own(ranking) for ranking in ("pursuit", "importance", "top")},
}
"""Rankings of the package and of `rankings.py`."""
SETTINGS: Mapping[str, dict[str, Any]] = {
    "kept": {},
    "kept, unbiased": {"weights": "unbiased"},
    "none kept": {"kept_sources": []},
}
"""Kept sources and weights: the default, unbiased weights with kept sources, and no kept sources."""
TITLES = {"kept": "kept sources", "kept, unbiased": "kept, unbiased weights", "none kept": "none kept"}


EXAMPLES = ("zeroth_order, K=1; facility", "zeroth_order, K=1; systematic", "loss; systematic", "length; systematic")
"""Ways in the table of variances, in addition to the rankings of the default estimator."""


def ways() -> dict[str, dict[str, Any]]:
    """Options of every way to select, by name; the first two do not rank."""
    found: dict[str, dict[str, Any]] = {method: {"method": method} for method in (REFERENCE, "random")}
    for estimator, options in ESTIMATORS.items():
        for ranking, option in RANKINGS.items():
            if (estimator, ranking) == ("length", "top"):
                continue  # it has no losses
            found[f"{estimator}; {ranking}"] = options | {"ranking": option}
    return found


class Remembered:
    """A tap that caches its results for each example."""

    def __init__(self, tap: Tap):
        self._tap, self._known = tap, {}

    def __getattr__(self, name: str):
        return getattr(self._tap, name)

    def bare_losses(self, batch: Batch) -> Tensor:
        return torch.stack(self._recall("loss", batch, self._tap.bare_losses))

    def branched_losses(self, batch: Batch, changes: Tensor) -> Tensor:
        found = self._recall(len(changes), batch, lambda b: self._tap.branched_losses(b, changes).T)
        return torch.stack(found, dim=1)

    def factors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        losses, delta, a = zip(*self._recall("factors", batch, self._factors))
        return torch.stack(losses), pad_sequence(delta, batch_first=True), pad_sequence(a, batch_first=True)

    def _factors(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        losses, delta, a = self._tap.factors(batch)
        lengths = batch.attention_mask.sum(1).tolist()
        return [(losses[i], delta[i, :n], a[i, :n]) for i, n in enumerate(lengths)]

    def _recall(self, what: object, batch: Batch, compute: Callable) -> list:
        lengths = batch.attention_mask.sum(1).tolist()
        keys = [(what, *tokens[:n]) for tokens, n in zip(batch.input_ids.tolist(), lengths)]
        if any(key not in self._known for key in keys):
            self._known.update(zip(keys, compute(batch)))
        return [self._known[key] for key in keys]


class Bench:
    """One model on one pool of examples.

    Args:
        options: The product's command line.
        pool: N, how many examples.
    """

    def __init__(self, options: list[str], pool: int):
        torch.set_num_threads(1)
        self.config = config = resolve(arguments.parse(options))
        self.group = group = connect()
        self.inputs = inputs = read_inputs(config, group)
        self.examples = inputs.sampler.examples
        self.module, weights, self.probe_tap = assembly.build_model(config, loading_device(config, {}, group), group)
        self.engine = engine = make_engine(config, {}, self.module, group, weights)
        random = replace(config, selection=replace(config.selection, method="random"))
        spans = Spans(group.device, memory_meter(group))
        self._step = assembly.build_step(random, inputs, engine, None, spans, group)
        count = int(inputs.sizes.sum())
        self.pool = torch.randperm(count, generator=generator(config.train.seed, "pool"))[:pool]
        """``[N]`` indices of the examples."""

    def train(self, numbers: Iterable[int], of: int) -> None:
        """Train these steps of a run of ``total`` steps on random candidates."""
        for number in numbers:
            self._step(number, learning_rate(self.config.train, number, of))

    def products(self) -> Tensor:
        """``[N, N]`` float64 inner products of the gradients of the pool's examples, over all adapters."""
        tap, n = AdapterTap(self.module), len(self.pool)
        found = torch.zeros(n, n, dtype=torch.float64)
        for names in in_memory({name: matrix.weight.numel() for name, matrix in tap.matrices.items()}, n):
            gradients = torch.zeros(n, sum(tap.matrices[name].weight.numel() for name in names))
            for batch in self.micro_batches():
                own = tap.gradients(batch, torch.eye(len(batch.positions), device=self.group.device))
                gradients[batch.positions] = torch.cat([own[name].flatten(1) for name in names], dim=1).cpu()
            found += (gradients @ gradients.T).double()
        return found

    def weights(self, options: Mapping[str, Any], tap: Remembered, draws: int) -> Tensor:
        """``[draws, N]`` weight of each example of the pool in the coreset of each draw."""
        selection = replace(self.config.selection, candidates=CANDIDATES, budget=BUDGET, **options)
        kept = kept_sources(self.inputs.sizes, self.inputs.source_names, selection.kept_sources)
        shares = source_shares(selection.shares, self.inputs.source_names, self.inputs.sizes)
        rule = SelectionRule(selection, kept, self.config.train.seed, shares)
        estimator = None
        if selection.method == "colm":
            estimator = make_estimator(tap, selection, self.config.train, self.group)
        found = torch.zeros(WARM_UP + draws, len(self.pool), dtype=torch.float64)
        for number in range(WARM_UP + draws):
            places, candidates = self.candidates(number)
            chosen = self._select(rule, estimator, candidates)
            labels = self.examples.label_counts(candidates.indices[chosen.positions])
            found[number, places[chosen.positions]] = loss_shares(chosen, labels, self.config.train.loss).double()
        return found[WARM_UP:]

    def everything(self, draws: int) -> Tensor:
        """``[draws, N]`` weight of each example of the pool among all candidates."""
        return self.weights({"method": "full"}, self.tap(), draws)

    def tap(self) -> Remembered:
        """A tap with an empty cache."""
        return Remembered(self.probe_tap)

    def candidates(self, number: int) -> tuple[Tensor, Candidates]:
        """Positions in the pool, and the candidates, of a draw."""
        draw = generator(self.config.train.seed, "draw", number)
        places = torch.randperm(len(self.pool), generator=draw)[:CANDIDATES]
        index, data = self.pool[places], self.examples
        return places, Candidates(number, index, data.ids[index], data.sources[index], data.lengths[index])

    def _select(self, rule: SelectionRule, estimator, candidates: Candidates):
        """Select as `CoresetStep` does, on one rank."""
        quota = rule.quota(candidates)
        if estimator is None:
            return rule.select(candidates, quota, None)
        budget = self.config.train.micro_batch_tokens
        plan = plan_sketch(candidates, quota, 1, budget, estimator.known(candidates))
        share = [torch.tensor(positions) for positions in plan.shares[0]]
        estimator.sketch(plan, [self.collate(candidates.indices[at], at) for at in share])
        selection = rule.select(candidates, quota, estimator.gather())
        estimator.learn(selection)
        return selection

    def micro_batches(self) -> Iterator[Batch]:
        lengths, budget = self.examples.lengths[self.pool], self.config.train.micro_batch_tokens
        for members in form_micro_batches(lengths, torch.arange(len(lengths)), budget):
            positions = torch.tensor(members)
            yield self.collate(self.pool[positions], positions)

    def collate(self, indices: Tensor, positions: Tensor) -> Batch:
        return collate(self.examples, indices, positions, self.inputs.tokenizer.pad_token_id, self.group.device)


def in_memory(sizes: Mapping[str, int], examples: int) -> Iterator[list[str]]:
    """Group parameters so that the gradients of all examples for a group fit into memory."""
    names, held = [], 0
    for name, size in sizes.items():
        if names and (held + size) * examples > MOST_NUMBERS:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def nearness(products: Tensor, own: Tensor, whole: Tensor) -> dict[str, Tensor]:
    """Error and cosine between the gradients of weightings ``own`` and ``whole``, both ``[draws, N]``.

    ``squared`` is ``|g - G|^2 / |G|^2`` with the gradient ``G`` of the whole pool; ``bias`` estimates the part of its
    mean that would remain for the mean of infinitely many draws.
    """

    def inner(one: Tensor, other: Tensor) -> Tensor:
        return (one @ products * other).sum(-1)

    mean = torch.full_like(own[0], 1 / len(products))
    length, draws = inner(mean, mean), len(own)
    squared = inner(own - mean, own - mean) / length
    variance = inner(own - own.mean(0), own - own.mean(0)).sum() / (draws - 1) / length
    return {
        "cosine": inner(own, whole) / (inner(own, own) * inner(whole, whole)).sqrt(),
        "error": (inner(own - whole, own - whole) / inner(whole, whole)).sqrt(),
        "squared": squared,
        "bias": (squared.mean() - variance).clamp(min=0),
    }


def interval(values: Tensor) -> dict[str, float]:
    """Mean over draws, and half of its 95 % confidence interval."""
    return {"mean": float(values.mean()), "interval": float(1.96 * values.std() / math.sqrt(len(values)))}


def uniform(bench: Bench, size: int, draws: int) -> Tensor:
    """``[draws, N]`` equal weights of ``size`` random examples of the pool in each draw."""
    found = torch.zeros(draws, len(bench.pool), dtype=torch.float64)
    for number, own in enumerate(found):
        own[torch.randperm(len(own), generator=generator(0, "uniform", size, number))[:size]] = 1 / size
    return found


def measure(bench: Bench, draws: int, only: str) -> Iterator[tuple[str, dict[str, Any], dict[str, float]]]:
    """Measure every way to select, and as many random examples."""
    products, tap, whole = bench.products(), bench.tap(), bench.everything(draws)
    sizes = {
        size: interval(nearness(products, uniform(bench, size, draws), whole)["squared"])
        for size in (BUDGET, CANDIDATES, 2 * CANDIDATES)
    }
    for setting, shared in SETTINGS.items():
        found, reference = {}, None
        for way, options in ways().items():
            if only not in way and way != REFERENCE:
                continue
            try:
                own = bench.weights(shared | options, tap, draws)
            except UserError as error:  # these options exclude each other
                print(f"{setting}: {way}: {error}", flush=True)
                continue
            near = nearness(products, own, whole)
            reference = near["error"] if way == REFERENCE else reference
            numbers = {name: interval(near[name]) for name in ("cosine", "error", "squared")}
            beyond = interval(near["error"] - (near["error"] if reference is None else reference))
            found[way] = numbers | {"bias": float(near["bias"]), "error_beyond_stratified": beyond}
            print(f"{setting}: {way}: error {numbers['error']['mean']:.3f}", flush=True)
        yield setting, found, sizes


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default: the built-in base")
    parser.add_argument("--data", help="training file; default: the built-in mixture")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 40], help="training steps before each measurement")
    parser.add_argument("--pool", type=int, default=2048, help="examples whose gradients are computed")
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--only", default="", help="only ways whose names contain this, and stratified")
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    named = {"--model.name": given.model, "--data.train": given.data}
    bench = Bench([part for pair in named.items() if pair[1] for part in pair] + options, given.pool)
    done = 0
    for steps in sorted(given.steps):
        bench.train(range(done + 1, steps + 1), of=2 * max(given.steps))
        done = steps
        facts = {"model": name(given.model), "data": name(given.data), "steps": steps, "draws": given.draws}
        for setting, found, sizes in measure(bench, given.draws, given.only):
            row = {"benchmark": "gradient_match", **facts, "pool": len(bench.pool), "setting": setting}
            row |= {"ways": found, "random_sizes": sizes, "environment": rows.here()}
            rows.append("gradient_match", row)


def name(given: str | None) -> str:
    """Name of a model or file without its folder."""
    return given.rstrip("/").split("/")[-1] if given else BUILT_IN


def by_setting(steps: int) -> dict[str, dict]:
    """The last row of each setting, on the built-in base and mixture."""
    found = [row for row in rows.read("gradient_match") if row["steps"] == steps and row["model"] == BUILT_IN]
    last = {row["setting"]: row for row in found if row["data"] == BUILT_IN}
    return {setting: last[setting] for setting in SETTINGS}


def measured(steps: int) -> list[str]:
    """Ways that have rows, including those that the product no longer has."""
    return [*dict.fromkeys(way for row in by_setting(steps).values() for way in row["ways"])]


def match_table(steps: int) -> str:
    """Relative error and cosine of every way; bold if the error is below that of `stratified`."""

    def cell(row: dict, way: str) -> str:
        if way not in row["ways"]:
            return "-"
        found = row["ways"][way]
        error, beyond = found["error"], found["error_beyond_stratified"]
        text = f"{error['mean']:.3f} ± {error['interval']:.3f}"
        text = f"**{text}**" if beyond["mean"] + beyond["interval"] < 0 else text
        return f"{text} ({found['cosine']['mean']:.3f})"

    return _table(steps, "estimator; ranking", dict.fromkeys(measured(steps), cell))


def variance_table(steps: int) -> str:
    """Squared error against the gradient of the whole pool, for some ways and for random examples."""

    def cell(row: dict, way: str) -> str:
        if way not in row["ways"]:
            return "-"
        squared = row["ways"][way]["squared"]
        return f"{squared['mean']:.3f} ± {squared['interval']:.3f} ({row['ways'][way]['bias']:.3f})"

    def random(row: dict, size: str) -> str:
        squared = row["random_sizes"][size.split()[0]]
        return f"{squared['mean']:.3f} ± {squared['interval']:.3f}"

    sizes = [f"{size} at random, no candidates" for size in (BUDGET, CANDIDATES, 2 * CANDIDATES)]
    of_default = ("last_layer, columns", *EXAMPLES)
    shown = [way for way in measured(steps) if "; " not in way or way.startswith(of_default)]
    return _table(steps, "trained", dict.fromkeys(sizes, random) | dict.fromkeys(shown, cell))


def _table(steps: int, first: str, cells: Mapping[str, Callable[[dict, str], str]]) -> str:
    settings = by_setting(steps)
    lines = [
        f"| {first} | {' | '.join(TITLES[setting] for setting in settings)} |",
        f"|---|{'---:|' * len(settings)}",
    ]
    for way, cell in cells.items():
        lines.append(f"| {way} | {' | '.join(cell(row, way) for row in settings.values())} |")
    return "\n".join(lines)


TABLES = {
    "gradient match before training": lambda: match_table(0),
    "gradient match": lambda: match_table(40),
    "gradient variance": lambda: variance_table(40),
}


if __name__ == "__main__":
    main()
