"""The estimator that a configuration names."""

from __future__ import annotations

from colm_scale.config import SelectionConfig, TrainConfig
from colm_scale.config.user_functions import is_own
from colm_scale.distributed.group import Group
from colm_scale.estimators.base import Estimator
from colm_scale.estimators.last_layer import CountSketched, LastLayer
from colm_scale.estimators.measured import Length, Measured
from colm_scale.estimators.zeroth_order import ZerothOrder
from colm_scale.selection.moments import Moments, Shapes, make_moments
from colm_scale.sketch import zeroth_order
from colm_scale.sketch.compress import CountSketch
from colm_scale.sketch.tap import Tap


def make_estimator(tap: Tap, selection: SelectionConfig, train: TrainConfig, group: Group) -> Estimator:
    """Make the estimator of a run, with fresh moments and without sketch reuse (see `reusing`)."""

    def fresh(shapes: Shapes) -> Moments:
        return make_moments(train, shapes, group.device)

    if is_own(selection.estimator):
        return Measured(tap, group, selection.estimator)
    if selection.estimator == "length":
        return Length(group)
    if selection.estimator == "zeroth_order":
        directions = zeroth_order.probes(train.seed, selection.num_probes, tap.size, group.device)
        moments = fresh(((1, 1) if selection.num_probes == 1 else tap.shape,))
        return ZerothOrder(tap, group, moments, directions, selection.columns)
    if selection.compression == "countsketch":
        projection = CountSketch(train.seed, tap.size, selection.columns, group.device)
        return CountSketched(tap, group, fresh((tap.shape,)), projection)
    return LastLayer(tap, group, fresh((tap.shape,)), selection.columns)
