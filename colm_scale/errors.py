"""The two ways a run ends early: the user's input was wrong, or training itself went wrong."""


class UserError(ValueError):
    """Wrong input. The message names the offending value, where it stands, and the way out; exit code 2."""


class TrainingError(RuntimeError):
    """Training cannot go on (a NaN loss, ranks that disagree). Names the step and the examples; exit code 1."""
