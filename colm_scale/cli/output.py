"""Standard output that a run outlives: its reader may leave, as in ``| head``, and its encoding may lack letters."""

from __future__ import annotations

import io
import os
import sys


def keep_writing() -> None:
    """Make standard output and errors ignore readers that have left, and escape letters that cannot be encoded."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # tests and notebooks have others
            encoding, by_line = stream.encoding, stream.line_buffering
            setattr(sys, name, _Lasting(stream.detach(), encoding, "backslashreplace", line_buffering=by_line))


class _Lasting(io.TextIOWrapper):
    """A stream whose text goes nowhere once nobody reads it."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
