"""Errors that end a run."""


class UserError(ValueError):
    """Wrong input; exit code 2. The message names the wrong value, its place, and the way out."""


class TrainingError(RuntimeError):
    """Training cannot continue (a NaN loss, ranks that disagree); exit code 1. Names the step and the examples."""


def one_line(error: Exception, lines: int | None = None) -> str:
    """Join the first ``lines`` lines of an error's message, by default all."""
    found = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(found[:lines]) or type(error).__name__
