"""What a plan has to be told beyond the run's own options."""

from __future__ import annotations

from dataclasses import dataclass

from colm_scale.config.checks import require


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The machines and the data of a run that is planned."""

    world_size: int = 1
    """Ranks, as many as GPUs."""
    tokens: int = 200
    """Tokens of an average example, prompt included."""
    sources: int = 10
    """Sources whose candidates are ranked."""
    label_share: float = 0.5
    """Share of an example's tokens that carries loss."""
    memory_gib: float | None = None
    """Memory of a GPU. With it, the plan says what fits."""
    tflops: float | None = None
    """What a rank computes in practice, in TFLOP per second. With it, the plan says how long a step takes at least."""

    def __post_init__(self) -> None:
        require(self.world_size >= 1, "plan.world_size", self.world_size, "at least 1")
        require(self.tokens >= 2, "plan.tokens", self.tokens, "at least 2")
        require(self.sources >= 1, "plan.sources", self.sources, "at least 1")
        require(0 < self.label_share <= 1, "plan.label_share", self.label_share, "above 0, at most 1")
        require(self.memory_gib is None or self.memory_gib > 0, "plan.memory_gib", self.memory_gib, "positive")
        require(self.tflops is None or self.tflops > 0, "plan.tflops", self.tflops, "positive")
