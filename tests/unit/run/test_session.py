"""Which adapter a run keeps as its best."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from unittest.mock import Mock

from support.runs import SOURCES, evaluation

from colm_scale.reporting.summary import Evaluation
from colm_scale.run.reports import Reports
from colm_scale.run.session import Session


def kept(monkeypatch, *evaluations: Evaluation) -> list[int]:
    """The steps whose adapter is saved as the best so far, of evaluations one after the other."""
    saved, coming = [], iter(evaluations)
    engine, evaluator = SimpleNamespace(module=None), Mock(evaluates=True, side_effect=lambda *_, whole: next(coming))
    session = Session(engine, evaluator, Reports(), group=None)
    monkeypatch.setattr(Session, "_save", lambda self, name: saved.append((name, self._best.step)))
    for one in evaluations:
        session.evaluate(one.step, whole=one.whole)
    assert {name for name, _ in saved} <= {"adapter"}
    return [step for _, step in saved]


def of(step: int, sample_loss: float, all_loss: float | None = None, examples: int = 2) -> Evaluation:
    """One with these means over sources; without ``all_loss`` of the sample alone."""
    whole = all_loss is not None
    found = evaluation(step, SOURCES, whole=whole)
    counts = dict.fromkeys(SOURCES, examples)
    sample = dataclasses.replace(found.sample, loss_by_source=sample_loss, counts=counts)
    return dataclasses.replace(found, loss_by_source=all_loss if whole else sample_loss, sample=sample)


def test_the_best_has_the_lowest_loss_of_the_sample_and_comes_after_the_first_step(monkeypatch):
    assert kept(monkeypatch, of(0, 1.0, 1.0), of(2, 5.0), of(4, 3.0), of(6, 4.0), of(8, 3.0, 2.0)) == [2, 4]


def test_the_last_evaluation_is_not_better_for_its_other_examples_being_easier(monkeypatch):
    """All examples have a lower loss than the sample had before, and the sample a higher one."""
    assert kept(monkeypatch, of(2, 3.0), of(4, 3.5, 0.5)) == [2]
    assert kept(monkeypatch, of(2, 3.0), of(4, 2.5, 9.0)) == [2, 4]


def test_losses_of_other_samples_are_not_compared(monkeypatch):
    assert kept(monkeypatch, of(2, 3.0), of(4, 5.0, examples=7), of(6, 4.0, examples=7)) == [2, 4, 6]
