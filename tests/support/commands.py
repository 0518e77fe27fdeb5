"""Run the product's commands in processes, and collect output, exit codes and files.

Everything runs on the CPU, offline, and on its own port, independent of the machine and of other runs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LAUNCHER = "launchers/train.py"
SABOTAGED = "tests/support/sabotage.py"
SMALL = (
    *("--train.steps", "2", "--train.threads", "1", "--selection.candidates", "16", "--selection.budget", "8"),
    *("--eval.every", "0", "--eval.generate", "0", "--eval.limit", "2"),
)
"""Options of a run of about one second after startup."""

_MARK = "COLM_SCALE_TEST_COMMAND"
_BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a command.

    Attributes:
        code: The exit code; of several ranks, the first that is not 0.
    """

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines of the error message."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]

    def succeeded(self) -> Outcome:
        assert self.code == 0, f"exit code {self.code}\n{self.stdout[-2000:]}\n{self.stderr[-4000:]}"
        return self


def python(script: str = LAUNCHER) -> list[str]:
    return [sys.executable, script]


def torchrun(processes: int, script: str = LAUNCHER) -> list[str]:
    return [str(_BIN / "torchrun"), "--nproc_per_node", str(processes), "--master_port", str(free_port()), script]


def deepspeed(processes: int, script: str = LAUNCHER) -> list[str]:
    return [str(_BIN / "deepspeed"), "--num_gpus", str(processes), "--master_port", str(free_port()), script]


def free_port() -> int:
    """A free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Command:
    """A started command and all its descendants, including orphans.

    Use it as a context manager, which kills what is left at the end.

    Args:
        talks: Use pipes for input and output; otherwise no input, and output in files in ``log``.
    """

    def __init__(self, arguments: Sequence[str], log: Path, *, talks: bool = False, **variables: str):
        self._mark, self._log = uuid.uuid4().hex, log
        log.mkdir(parents=True, exist_ok=True)
        self._files = [(log / name).open("w+", encoding="utf-8") for name in ("stdout.txt", "stderr.txt")]
        self.process = subprocess.Popen(
            list(arguments),
            cwd=ROOT,
            env=_environment(variables | {_MARK: self._mark}),
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else self._files[0],
            stderr=self._files[1],
            text=True,
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [self.process, *self.alive()]:
            process.kill()
        self.process.wait()
        for file in self._files:
            file.close()

    def alive(self) -> list[psutil.Process]:
        """Running processes of this command."""
        return [process for process in psutil.process_iter() if self._is_mine(process)]

    def outcome(self, seconds: float = 180) -> Outcome:
        """Wait for the end of the command; its descendants may still run."""
        code = self.process.wait(seconds)
        return Outcome(code, *((self._log / name).read_text("utf-8") for name in ("stdout.txt", "stderr.txt")))

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False


def run(arguments: Sequence[str], log: Path, seconds: float = 180, **variables: str) -> Outcome:
    """Run a command to its end."""
    with Command(arguments, log, **variables) as command:
        return command.outcome(seconds)


class Hung(AssertionError):
    """A run exceeded its time limit."""


class Forked:
    """A process with the imports of ``launchers/train.py``, which forks into the ranks of a run or another command.

    Importing takes most of the time of a short run. Ranks see it as their launcher, but it does nothing for them. Use
    it as a context manager, which kills what is left at the end.

    Args:
        prefix: Command that starts the process.
    """

    def __init__(self, log: Path, *prefix: str):
        self._command = Command([*prefix, sys.executable, "tests/support/forked.py"], log, talks=True)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self._command.__exit__()

    @property
    def pid(self) -> int:
        return self._command.process.pid

    def left(self) -> list[psutil.Process]:
        """Running processes that it started."""
        return [process for process in self._command.alive() if process.pid != self.pid]

    def start(
        self, options: Sequence[str], log: Path, ranks: int = 1, command: str = "train", absent: Sequence[int] = (),
        hosts: int = 1, **own: str,
    ) -> Ranks:  # fmt: skip
        """Start a run or another command, with output in ``LOG.stdout`` and ``LOG.stderr``.

        Args:
            absent: Ranks that are not started.
            hosts: As many as the ranks are told that they are on.
            own: Variables of the environment.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        for stream in ("stdout", "stderr"):
            Path(f"{log}.{stream}").write_text("", "utf-8")
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        local = ranks // hosts
        shared = meeting | {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local} | own
        present = [rank for rank in range(ranks) if rank not in absent]
        launched = [shared | {"RANK": rank, "LOCAL_RANK": rank % local} for rank in present] if ranks > 1 else [own]
        variables = [{name: str(value) for name, value in of_rank.items()} for of_rank in launched]
        return Ranks(self, self._ask({"words": [command, *options], "log": str(log), "ranks": variables}), log)

    def run(self, command: str, options: Sequence[str], log: Path, ranks: int = 1, seconds: float = 180) -> Outcome:
        """Run a command to its end."""
        return self.start(options, log, ranks, command).outcome(seconds)

    def run_many(self, jobs: Mapping[str, Sequence[str]], log: Path, at_once: int = 2) -> dict[str, Outcome]:
        """Train with the options of each job, in order, in separate processes."""
        started: dict[str, Ranks] = {}
        for name, options in jobs.items():
            wait_until(lambda: sum(ranks.running() for ranks in started.values()) < at_once, 180)
            started[name] = self.start(options, log / name)
        return {name: ranks.outcome(180) for name, ranks in started.items()}

    def codes(self, pids: Sequence[int]) -> list[int | None]:
        """Exit codes, negative for a signal; None for a running rank."""
        return self._ask({"ended": list(pids)})

    def _ask(self, question: dict) -> list:
        process = self._command.process
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of one run, started by a `Forked` process."""

    forked: Forked
    pids: list[int]
    log: Path

    def codes(self) -> list[int | None]:
        """`Forked.codes` by rank."""
        return self.forked.codes(self.pids)

    def running(self) -> bool:
        return None in self.codes()

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks, or to all, if they are running."""
        codes = self.codes()
        for rank in ranks or range(len(self.pids)):
            if codes[rank] is None:  # the id may have been reused otherwise
                os.kill(self.pids[rank], number)

    def outcome(self, seconds: float) -> Outcome:
        """Wait for the end of all ranks.

        Raises:
            Hung: They exceeded the time limit and were killed.
        """
        try:
            wait_until(lambda: not self.running(), seconds)
        except AssertionError as error:
            self.send(signal.SIGKILL)
            wait_until(lambda: not self.running(), 10)
            raise Hung(f"ranks {self.codes()} of {self.log.name}: {error}") from None
        said = (Path(f"{self.log}.{stream}").read_text("utf-8") for stream in ("stdout", "stderr"))
        return Outcome(next((code for code in self.codes() if code), 0), *said)


def wait_until(condition: Callable[[], object], seconds: float) -> float:
    """Wait for ``condition`` and return the seconds; fails after ``seconds``."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} seconds"
        time.sleep(0.1)
    return time.monotonic() - started


def rows(path: Path) -> list[dict]:
    """The lines of a JSONL file; those of a selection with the name of each candidate's source."""
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    names: list[str] = []
    for row in found if path.name == "selection.jsonl" else ():
        names = row.pop("names", names)
        row["sources"] = [names[source] for source in row["sources"]]
    return found


def write_rows(path: Path, content: Sequence[Mapping]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    return path


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    return kept | {
        "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
