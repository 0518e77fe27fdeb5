"""Read malformed files in a separate process with limits on time and memory, and count the outcomes.

A file is *read* if its rows are well formed and can be tokenised, an *error* if one clear line states the problem, and
otherwise a *failure*: another exception, an unclear message, a hang, or the end of the process.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import psutil
import torch

from colm_scale.config import DataConfig, ModelConfig
from colm_scale.data.examples import tokenise
from colm_scale.data.messages import ROLES
from colm_scale.data.readers import Row, read_rows
from colm_scale.errors import UserError
from colm_scale.modeling.load import load_tokenizer
from support.malformed import SUFFIXES, malformed

SECONDS = 20
"""Time limit of a file, generous enough for a busy machine."""
MEMORY_BYTES = 3 * 2**30
"""Memory limit in addition to the libraries."""
_START_SECONDS = 120
_LONGEST_MESSAGE = 1000
_CONFIG = DataConfig()
_NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a file."""

    number: int
    suffix: str
    mutation: str
    outcome: Literal["read", "error", "failure"]
    said: str = ""
    peak_bytes: int = 0


def fuzz(seed: int, numbers: Sequence[int]) -> Iterator[Verdict]:
    """Outcomes of the files of a seed."""
    waiting = list(numbers)
    context = multiprocessing.get_context("fork")  # inherits the imports
    while waiting:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, seed, waiting), daemon=True)
        process.start()
        sender.close()
        yield from _received(receiver, seed, waiting)
        process.kill()
        process.join()


def _received(receiver: Connection, seed: int, waiting: list[int]) -> Iterator[Verdict]:
    """Outcomes in one process, until all files are read or one ends it; removes their numbers."""
    assert receiver.poll(_START_SECONDS), "the process did not start"
    assert receiver.recv() == "ready"
    while waiting:
        said = f"not done within {SECONDS} seconds"
        try:
            if receiver.poll(SECONDS):
                verdict = receiver.recv()
                waiting.pop(0)
                yield verdict
                continue
        except EOFError:
            said = "the process is gone"
        file = malformed(seed, number := waiting.pop(0))
        yield Verdict(number, file.suffix, file.mutation, "failure", said)
        return


def _work(sender: Connection, seed: int, numbers: Sequence[int]) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    tokenizer = load_tokenizer(ModelConfig())
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sender.send("ready")
    with TemporaryDirectory() as folder:
        for number in numbers:
            file = malformed(seed, number)
            path = Path(folder) / f"file_{number}{file.suffix}"
            path.write_bytes(file.content)
            outcome, said = judged(path, tokenizer)
            path.unlink()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            sender.send(Verdict(number, file.suffix, file.mutation, outcome, said, peak))


def judged(path: Path, tokenizer) -> tuple[Literal["read", "error", "failure"], str]:
    """Outcome and message of one file."""
    try:
        rows = read_rows([str(path)], _CONFIG)
        examples = tokenise(rows, tokenizer, _CONFIG, max_length=_NO_LIMIT)
    except UserError as error:
        return ("error" if is_clear(str(error), path) else "failure"), str(error)
    except Exception as error:
        return "failure", f"{type(error).__name__}: {str(error)[:_LONGEST_MESSAGE]}"
    if odd := [row for number, row in enumerate(rows) if not is_well_formed(row, number, path)]:
        return "failure", f"a row is {odd[0]}"
    whole = len(examples) == len(rows) and int(examples.label_counts(examples.ids).min()) >= 1
    return ("read", "") if whole else ("failure", f"{len(examples)} of {len(rows)} rows are there")


def is_clear(message: str, path: Path) -> bool:
    """True if the message is one line of readable length that names the file, and not an out-of-memory error."""
    named = str(path) in message
    return named and message.isprintable() and len(message) < _LONGEST_MESSAGE and "MemoryError" not in message


def is_well_formed(row: Row, number: int, path: Path) -> bool:
    """True if a row has the types of `Row`."""
    if not row.messages:
        answers, texts = [row.completion], [row.prompt]
    else:
        answers = [message.content for message in row.messages if message.role == "assistant"]
        texts = [message.content for message in row.messages if message.role in ROLES]
        if len(texts) < len(row.messages):
            return False
    texts = [*texts, *answers, row.source, row.where]
    if not all(isinstance(text, str) and text.encode() is not None for text in texts):
        return False
    return (
        row.id == number
        and row.where.startswith(str(path))
        and row.source != ""
        and answers != []
        and all(answer.strip() for answer in answers)
    )


def tally(verdicts: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    """Files by format and outcome."""
    outcomes = ("read", "error", "failure")
    return {
        suffix: {
            outcome: sum((verdict.suffix, verdict.outcome) == (suffix, outcome) for verdict in verdicts)
            for outcome in outcomes
        }
        for suffix in SUFFIXES
    }
