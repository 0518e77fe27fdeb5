"""Arms of the learning benchmark, in groups: options of the product for one step.

By default, 32 of 64 candidates are trained on. Arms that rank or allocate keep the same sources as `stratified`, unless
their name says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

REFERENCE = "stratified"
"""The arm whose step time is the unit, and which ranking and allocation have to beat."""

REMOVED = None
"""Marks an arm that the product no longer has; its rows are still shown."""

LOSS = f"{Path(__file__).resolve().parents[1] / 'docs' / 'examples' / 'loss_estimator.py'}:loss"
"""The candidates' losses as an estimator defined by the user."""

_Options = tuple[str, ...]


def _options(**selection: object) -> _Options:
    return tuple(part for name, value in selection.items() for part in (f"--selection.{name}", str(value)))


def _full(n: int) -> _Options:
    return _options(method="full", candidates=n, budget=n)


def _stratified(**selection: object) -> _Options:
    return _options(method="stratified", **selection)


def _facility(**selection: object) -> _Options:
    return _options(**{"ranking": "facility", "compression": "columns"} | selection)


def _columns(ranking: str, **selection: object) -> _Options:
    """Rank each step on its own."""
    return _options(ranking=ranking, compression="columns", **selection)


def _by_loss(ranking: str) -> _Options:
    return _options(estimator=LOSS, ranking=ranking)


def own(function: str, file: str = "rankings.py") -> str:
    """A function of a file beside this one, as a part defined by the user."""
    return f"{Path(__file__).resolve().with_name(file)}:{function}"


_NOTHING_KEPT = {"kept_sources": "[]"}
_REUSED = {"compression": "countsketch", "columns": 256, "reuse": 1000}

GROUPS: MappingProxyType[str, dict[str, _Options | None]] = MappingProxyType(
    {
        "main": {
            "stratified": _stratified(),
            "random": _options(method="random"),
            "full b": _full(32),
            "full n": _full(64),
            "full 2n": _full(128),
            "paper": _options(preset="paper"),
            "colm": (),
            "last_layer": _facility(),
            "stratified 2b": _stratified(candidates=128, budget=64),
        },
        "probes": {
            "zeroth_order 16": _facility(estimator="zeroth_order", num_probes=16),
        },
        "rankings": {
            "last_layer matching": _columns("matching"),
            "last_layer matching unbiased": _columns("matching", weights="unbiased"),
            "last_layer balanced": _columns(own("balanced")),
            "last_layer pursuit": _columns(own("pursuit")),
            "last_layer systematic": _columns("systematic"),
            "last_layer importance": _columns(own("importance"), weights="unbiased"),
            "last_layer top": _columns(own("top")),
            "last_layer joint": REMOVED,
            "last_layer joint matching": REMOVED,
            "last_layer free matching, nothing kept": REMOVED,
            "last_layer countsketch": _facility(compression="countsketch", columns=256),
            "loss systematic": _by_loss("systematic"),
            "loss top": _by_loss(own("top")),
            "length systematic": _options(estimator="length", ranking="systematic"),
        },
        "amortised": {
            "amortised 100": _facility(compression="countsketch", columns=256, reuse=100),
            "amortised loss systematic 100": REMOVED,
            "proxy 2 blocks": REMOVED,
        },
        "allocations": {
            "stratified, nothing kept": _stratified(**_NOTHING_KEPT),
            "equal": _stratified(shares="equal", **_NOTHING_KEPT),
            "equal unbiased": _stratified(shares="equal", weights="unbiased", **_NOTHING_KEPT),
            "temperature": _stratified(shares=0.5, **_NOTHING_KEPT),
            "excess_loss": REMOVED,
            "equal systematic by loss": (*_by_loss("systematic"), *_options(shares="equal", **_NOTHING_KEPT)),
            "equal last_layer": _facility(shares="equal", **_NOTHING_KEPT),
        },
        "free": {
            "words matching of 8b": _options(estimator=own("words", "words.py"), candidates=256, **_NOTHING_KEPT),
            "reused losses": _options(ranking=own("infobatch"), **_REUSED),
            "reused matching": REMOVED,
            "reused colm": _options(**_REUSED),
        },
        "h": {f"h {h}": _facility(columns=h) for h in (32, 128, 2048)},
        "eps": {f"eps {eps:g}": REMOVED for eps in (1e-4, 1e-3, 1e-2, 1e-1)},
        "K": {f"K {k}": _facility(estimator="zeroth_order", num_probes=k) for k in (1, 4)},
        "ratio": {
            f"b {b} of n {n}": _facility(candidates=n, budget=b) for n, b in ((64, 16), (128, 32), (256, 32), (64, 48))
        },
        "memory": {"colm, memory 0.9": REMOVED, "colm, memory 1": REMOVED},
        "boundary": {
            f"keep {share:.0%} of the sources": _stratified(kept_sources=share)
            for share in (0.25, 0.5, 0.75)
        },
        "cap": {f"cap {cap:.0%}": REMOVED for cap in (0.1, 0.2)},
        "staleness": {
            f"staleness {reuse}": _facility(compression="countsketch", columns=256, reuse=reuse)
            for reuse in (0, 20, 40, 400)
        },
    }
)
ARMS = MappingProxyType(
    {arm: options for group in GROUPS.values() for arm, options in group.items() if options is not REMOVED}
)
"""Arms that can still be run."""


def sized(arm: str, n: int, b: int) -> _Options:
    """Options of an arm that trains on b of n candidates; an arm whose name says its sizes keeps them."""
    of_sizes = {
        "full b": _full(b),
        "full n": _full(n),
        "full 2n": _full(2 * n),
        "stratified 2b": _stratified(candidates=2 * n, budget=2 * b),
    }
    return of_sizes.get(arm) or (*_options(candidates=n, budget=b), *ARMS[arm])
