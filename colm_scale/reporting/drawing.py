"""Text in plots."""

from __future__ import annotations

from contextlib import AbstractContextManager


def verbatim_text() -> AbstractContextManager[None]:
    """A block whose plots, made and saved within it, show text as it is.

    matplotlib reads what stands between two dollar signs as a formula, and fails where it is none; sources are called
    what their owners like.
    """
    import matplotlib

    return matplotlib.rc_context({"text.parse_math": False})
