"""Errors that end a run."""


class UserError(ValueError):
    """Wrong input; exit code 2. The message names the wrong value, its place, and the way out."""


class TrainingError(RuntimeError):
    """Training cannot continue (a NaN loss, ranks that disagree); exit code 1. Names the step and the examples."""
