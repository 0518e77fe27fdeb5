"""Standard output whose reader leaves, or whose encoding lacks letters."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WRITES = """
import sys
from rich.console import Console
from rich.table import Table
from colm_scale.cli.output import keep_writing
keep_writing()
table = Table("a", "b", title="weights \\u00b1 \\u03c3 \\u4e2d")
for number in range(3000):
    print("line", number, "\\u4e2d")
for _ in range(100):
    Console().print(table)
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("lines", [0, 1])
def test_a_reader_that_leaves_does_not_end_the_program(lines):
    with subprocess.Popen([sys.executable, "-c", WRITES], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"done\n"
    assert process.returncode == 0


def test_letters_that_cannot_be_encoded_are_escaped():
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    ended = subprocess.run([sys.executable, "-c", WRITES], capture_output=True, env=environment, check=True)
    assert ended.stdout.startswith(rb"line 0 \u4e2d")
    assert rb"weights \xb1" in ended.stdout
