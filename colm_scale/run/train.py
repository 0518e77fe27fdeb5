"""A training run: evaluate, step, evaluate, save."""

from __future__ import annotations

import dataclasses

from colm_scale.checkpoint.run_state import RunState
from colm_scale.config import RunConfig
from colm_scale.distributed.group import Group
from colm_scale.distributed.watch import Watch
from colm_scale.records import StepReport
from colm_scale.run import process
from colm_scale.run.prepare import Prepared, prepare
from colm_scale.run.schedule import evaluation_period, learning_rate
from colm_scale.run.session import Session
from colm_scale.step.floor import Work, bare_floor_seconds


def run(config: RunConfig) -> int:
    """Train on this rank; return the exit code of `process.run`."""
    return process.run(config, train)


def train(config: RunConfig, group: Group, watch: Watch) -> bool:
    """Train; return False if the run was asked to stop. All ranks call it together."""
    prepared = prepare(config, group, watch)
    watch.last_act = prepared.writer.finish
    with Session(prepared.engine, prepared.evaluator, prepared.reports, group) as session:
        state = prepared.state(session)
        done = state.load(prepared.found)
        prepared.claim(done)
        session.reports.start(prepared.steps, prepared.lines(done), done)
        return _run_steps(prepared, session, state, done)


def _run_steps(run: Prepared, session: Session, state: RunState, done: int) -> bool:
    """Make the steps after ``done``, with evaluations and checkpoints in between."""
    config, watch, steps, reports = run.config, run.watch, run.steps, session.reports
    evaluate_every = evaluation_period(config.eval, steps)
    if session.owed:
        session.evaluate(done, whole=done in (0, steps))
    for number in range(done + 1, steps + 1):
        watch.begin(number)
        report, work = run.step(number, learning_rate(config.train, number, steps))
        if _is_due(config.profile.floor_every, number):
            watch.enter("floor")
            report = _over_floor(run, report, work)
        reports.step(report)
        watch.enter("sources")
        if drift := run.step.refresh_sources(number):
            reports.drifted(drift)
        stoppable = number < steps or config.checkpoint.every > 0
        stopping = stoppable and _is_asked_to_stop(run)  # before an evaluation, which may take long
        session.owed = number == steps or _is_due(evaluate_every, number)
        if session.owed and not stopping:
            session.evaluate(number, whole=number == steps)
            stopping = number < steps and _is_asked_to_stop(run)
        is_last = stopping or number == steps
        if config.checkpoint.every and (is_last or _is_due(config.checkpoint.every, number)):
            watch.enter("checkpoint")
            reports.flush()
            state.save(number)
            if is_last:
                state.wait()
        for saved in run.writer.saved():
            reports.saved(saved)
        if stopping:
            reports.stopped(number)
            return False
    session.finish(steps)
    return True


def _is_asked_to_stop(run: Prepared) -> bool:
    """Return whether to save and stop: as asked, or because a checkpoint could not be written, of which `save` says
    why. All ranks call it together."""
    return run.group.any(run.watch.stop_requested or run.writer.failed)


def _is_due(every: int, number: int) -> bool:
    return every > 0 and number % every == 0


def _over_floor(run: Prepared, report: StepReport, work: Work) -> StepReport:
    floor = bare_floor_seconds(work, run.engine, run.group, run.config.train.seed)
    return dataclasses.replace(report, floor=report.seconds["step"] / floor)
