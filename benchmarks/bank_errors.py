"""What a gradient bank says of ways to select: errors, alone and over steps, noise scale, and the age of sketches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from bank_ways import ALL, WAYS, Pool, StoredTap
from gradient_match import interval
from torch import Tensor

_REPEATED = (
    *("last_layer countsketch; matching, with feedback", "zeroth_order, K=1; facility", "all adapters; matching"),
    "probe and source, together; matching",
)
REPEATED = tuple(
    way for way in WAYS if way in ("random", "stratified", *_REPEATED) or way.startswith("last_layer columns")
)
"""Ways whose errors are compared over several steps."""
TEN = 10
"""Steps that are averaged; Adam's momentum averages about as many."""


def squared(products: Tensor, own: Tensor, target: Tensor) -> Tensor:
    """``[draws]`` squared distances between the mean gradients of weightings ``[draws, N]``."""
    apart = own - target
    return (apart @ products * apart).sum(1)


def of_random(products: Tensor, b: int, n: int) -> float:
    """Expected squared distance of the mean of b random examples of n, to that of the n."""
    size = len(products)
    variance = (products.diagonal().sum() - products.sum() / size) / (size - 1)
    return float(variance) * (1 / b - 1 / n)


def errors(pool: Pool, setting: str, n: int, b: int, draws: int) -> dict[str, dict]:
    """Squared errors of each way, relative to the expected one of b random examples.

    Returns:
        ``{"ways": {way: ...}}`` with ``pool``, ``candidates``: against the gradient of the pool, and of the candidates;
        ``scaled``: against the pool's with Adam's scale; ``beyond``: against the pool's, minus that of a draw with the
        same quotas (`stratified`) among the same candidates; ``nearer``: share of the draws in which it is nearer to
        the gradient of the candidates than that one.
    """
    plain, scaled = (pool.products[kind]["all"] for kind in ("plain", "scaled"))
    everything = torch.zeros(draws, len(pool), dtype=torch.float64)
    for number, row in enumerate(everything):
        row[pool.draw(number, n)[0]] = 1 / n
    mean = torch.full_like(everything, 1 / len(pool))
    of_pool = of_random(plain, b, len(pool))
    drawn = pool.weights(WAYS["stratified"], setting, n, b, draws)
    found = {}
    for name, way in {ALL: None, **WAYS}.items():
        own = everything if way is None else pool.weights(way, setting, n, b, draws)
        against, to_draw = (squared(plain, w, everything) for w in (own, drawn))
        beyond = squared(plain, own, mean) - squared(plain, drawn, mean)
        found[name] = {
            "pool": interval(squared(plain, own, mean) / of_pool),
            "candidates": interval(against / of_random(plain, b, n)),
            "scaled": interval(squared(scaled, own, mean) / of_random(scaled, b, len(pool))),
            "beyond": interval(beyond / of_pool),
            "nearer": float((against < to_draw).double().mean()),
        }
        print(f"{b} of {n}, {setting}: {name}: {found[name]['pool']['mean']:.3f}", flush=True)
    return {"ways": found}


def noise_scales(pool: Pool) -> dict[str, dict[str, Any]]:
    """``{"scales": ...}``, the `noise` of all adapters, plain and scaled, and of the probe."""
    plain, scaled = (pool.products[kind] for kind in ("plain", "scaled"))
    chosen = {"all adapters": plain["all"], "all adapters, scaled": scaled["all"], "probe": plain["probe"]}
    return {"scales": {name: noise(products, pool.sources) for name, products in chosen.items()}}


def noise(products: Tensor, sources: Tensor) -> dict[str, Any]:
    """Simple gradient noise scale in examples, tr(S) / |G|^2, with 95 % intervals by the jackknife.

    ``total`` counts all spread, ``within`` only that within sources: the noise of a draw with proportional quotas.
    ``cosine`` and ``cosine_within`` are mean pairwise cosines, of all pairs and of those of the same source.
    """
    n = len(products)
    same = sources.unsqueeze(1) == sources
    lengths = products.diagonal().sqrt()
    cosines, others = products / lengths.outer(lengths), ~torch.eye(n, dtype=torch.bool)

    def scales(left: Tensor) -> Tensor:
        """``[2]`` of the examples in the mask."""
        p, of = products[left][:, left], sources[left]
        size = len(p)
        between = (p.sum() - p.diagonal().sum()) / (size * (size - 1))  # unbiased |G|^2
        counts = torch.bincount(of).double()
        sums = torch.zeros(len(counts), size, dtype=p.dtype).index_add_(0, of, p)
        of_source = torch.zeros(len(counts), dtype=p.dtype).index_add_(0, of, sums[of, torch.arange(size)])
        diagonal = torch.zeros(len(counts), dtype=p.dtype).index_add_(0, of, p.diagonal())
        several = counts > 1
        within = ((diagonal - of_source / counts.clamp(min=1)) / (counts - 1).clamp(min=1))[several]
        within = (within * counts[several]).sum() / counts[several].sum()
        return torch.stack([p.diagonal().mean() - between, within]) / between

    whole = scales(torch.ones(n, dtype=torch.bool))
    without = torch.stack([scales(torch.arange(n) != i) for i in range(n)])
    half = 1.96 * ((n - 1) / n * (without - without.mean(0)).square().sum(0)).sqrt()
    found = {name: {"mean": float(m), "interval": float(h)} for name, m, h in zip(("total", "within"), whole, half)}
    found |= {"cosine": float(cosines[others].mean()), "cosine_within": float(cosines[same & others].mean())}
    return found


def over_steps(pool: Pool, n: int, b: int, draws: int) -> dict[str, dict]:
    """Errors of steps that follow each other, alone and averaged as momentum does it; nothing kept.

    Returns:
        ``{"ways": {way: ...}}`` with ``one`` and ``ten``, of a step and of the mean of ten: squared, relative to the
        expected error of b random examples in a step; ``length``: mean squared length of the chosen examples'
        gradients, by weight, relative to the pool's.
    """
    plain, found = pool.products["plain"]["all"], {}
    of_pool, lengths = of_random(plain, b, len(pool)), plain.diagonal()
    for name in REPEATED:
        own = pool.weights(WAYS[name], "none kept", n, b, draws)
        tens = own.view(-1, TEN, len(pool)).mean(1)
        one, ten = (interval(squared(plain, of, torch.full_like(of, 1 / len(pool))) / of_pool) for of in (own, tens))
        found[name] = {"one": one, "ten": ten, "length": float((own @ lengths).mean() / lengths.mean())}
        print(f"{b} of {n}: {name}: {found[name]}", flush=True)
    return {"ways": found}


def aged(pool: Pool, tap: StoredTap, sizes: Sequence[tuple[int, int]], draws: int) -> dict[str, Any]:
    """How sketches age: those of an earlier state's ``tap``, compared with gradients and used in the pool's.

    Returns:
        ``probe``, ``all``: correlation of the distances between the sketches with those between today's gradients of
        the probe, and of all adapters; ``within``: the latter between examples of the same source; ``losses``:
        correlation of the losses; ``error``: of matching and of facility location with these sketches, as in `errors`.
    """
    plain = pool.products["plain"]
    pairs = torch.triu_indices(len(pool), len(pool), 1)
    same = pool.sources[pairs[0]] == pool.sources[pairs[1]]
    now, whole = distances(plain["probe"], pairs), distances(plain["all"], pairs)
    then = distances((tap.probe @ tap.probe.T).double(), pairs)
    mean = torch.full((draws, len(pool)), 1 / len(pool), dtype=torch.float64)
    found: dict[str, Any] = {
        "probe": correlation(then, now),
        "all": correlation(then, whole),
        "within": correlation(then[same], whole[same]),
        "losses": correlation(tap.losses.double(), pool.tap.losses.double()),
        "error": {},
    }
    for ranking, (n, b) in itertools.product(("matching", "facility"), sizes):
        own = pool.weights(WAYS[f"last_layer countsketch; {ranking}"], "none kept", n, b, draws, tap)
        error = squared(plain["all"], own, mean) / of_random(plain["all"], b, len(pool))
        found["error"][f"{ranking}, {b} of {n}"] = interval(error)
    return found


def distances(products: Tensor, pairs: Tensor) -> Tensor:
    """Distances of pairs ``[2, p]``."""
    own, (i, j) = products.diagonal(), pairs
    return (own[i] + own[j] - 2 * products[i, j]).clamp(min=0).sqrt()


def correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: of the ranks."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])
