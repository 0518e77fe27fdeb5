"""What has to be finite in a step, and how it is told if it is not."""

from __future__ import annotations

from torch import Tensor

from colm_scale.engines.base import Update
from colm_scale.errors import TrainingError
from colm_scale.records import Candidates, Selection, SketchPlan


def check_sketches(plan: SketchPlan, selection: Selection, step: int) -> None:
    """One bad example is left out and counted; if all are bad, it is not the examples."""
    sketched = len(plan.positions)
    if selection.invalid == sketched and (sketched > 1 or not len(selection)):
        raise TrainingError(
            f"step {step}: none of the {sketched} sketched candidates has a finite sketch; the adapter was not changed "
            f"by this step. Try --train.dtype float32, or --selection.method stratified, which needs no sketch"
        )


def check_update(update: Update, step: int) -> None:
    """Where a smaller loss scale is no way out, a gradient that is not finite ends the run."""
    if not update.applied and update.loss_scale == 1.0:
        raise TrainingError(
            f"step {step}: the norm of the gradient is {update.norm}, though every loss is finite. "
            f"Try a smaller --train.learning_rate, or --train.dtype float32"
        )


def check_losses(candidates: Candidates, selection: Selection, losses: Tensor, *, updated: bool = False) -> None:
    """Refuse a loss of the coreset that is not finite.

    Args:
        losses: ``[n]`` of the candidates.
        updated: Whether the optimizer has made its step already, as where the loop is another library's.

    Raises:
        TrainingError: Names step and ids.
    """
    bad = selection.positions[~losses[selection.positions].isfinite()]
    if len(bad):
        ids, changed = candidates.ids[bad].tolist(), "changed" if updated else "not changed"
        raise TrainingError(
            f"step {candidates.step}: the training loss of {len(ids)} selected example(s) is not finite, "
            f"ids {ids[:8]}{' ...' if len(ids) > 8 else ''}; the adapter was {changed} by this step. "
            f"Try a smaller --train.learning_rate, or look at these rows of the data"
        )
