"""The options of the trackers: where a run is followed, besides its own directory."""

from __future__ import annotations

from dataclasses import dataclass, field

from colm_scale.config.checks import require

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Experiment trackers that rank 0 sends every step and evaluation to. Off by default."""

    to: list[str] = field(default_factory=list)
    """Any of tensorboard (written to OUTPUT_DIR/tensorboard), wandb, mlflow and trackio; each must be installed, and is
    told where its server is and who you are by its own environment variables."""
    project: str = "colm_scale"
    """Project (wandb, trackio) or experiment (mlflow) that the run belongs to."""

    def __post_init__(self) -> None:
        for name in self.to:
            require(name in TRACKERS, "track.to", name, f"one or more of {', '.join(TRACKERS)}")
        require(len(set(self.to)) == len(self.to), "track.to", self.to, "each tracker once")
        require(bool(self.project), "track.project", self.project, "a name")
