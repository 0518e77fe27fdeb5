"""Running the product as its users do: processes, of which output, exit code and what they leave behind are looked at.

Everything runs on the CPU, offline, and on a port of its own, so that nothing depends on the machine or on other runs.
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
"""Options of a run that takes about a second once it has started."""

_MARK = "COLM_SCALE_TEST_COMMAND"
_BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command has done.

    Attributes:
        code: The exit code; of several ranks the first that is not 0.
    """

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
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
    """A port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Command:
    """A started command and all processes that come from it, also those that have lost their parent.

    Use it as a context, which kills whatever is left at its end.

    Args:
        talks: Whether its input and output are pipes; else it reads nothing and writes to a file in ``log``.
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
        """The processes that come from this command and run."""
        return [process for process in psutil.process_iter() if self._is_mine(process)]

    def outcome(self, seconds: float = 180) -> Outcome:
        """Wait for the end of the command (of which processes may be left)."""
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
    """A run that did not end in time."""


class Forked:
    """A process that has imported what ``launchers/train.py`` needs and forks itself into ranks of a run or of another
    command: most of a short run is importing. The ranks take it for their launcher, but it does nothing for them.

    Use it as a context, which kills whatever is left at its end.

    Args:
        prefix: What the process is started by.
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
        """What it has started and still runs."""
        return [process for process in self._command.alive() if process.pid != self.pid]

    def start(self, options: Sequence[str], log: Path, ranks: int = 1, command: str = "train") -> Ranks:
        """Start a run, or another command, whose output goes to ``LOG.stdout`` and ``LOG.stderr``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        for stream in ("stdout", "stderr"):
            Path(f"{log}.{stream}").write_text("", "utf-8")
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        shared = meeting | {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        launched = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)] if ranks > 1 else [{}]
        variables = [{name: str(value) for name, value in of_rank.items()} for of_rank in launched]
        return Ranks(self, self._ask({"words": [command, *options], "log": str(log), "ranks": variables}), log)

    def run(self, command: str, options: Sequence[str], log: Path, ranks: int = 1, seconds: float = 180) -> Outcome:
        """Run a command to its end."""
        return self.start(options, log, ranks, command).outcome(seconds)

    def run_many(self, jobs: Mapping[str, Sequence[str]], log: Path, at_once: int = 2) -> dict[str, Outcome]:
        """Train with each job's options, in their order, each in a process of its own."""
        started: dict[str, Ranks] = {}
        for name, options in jobs.items():
            wait_until(lambda: sum(ranks.running() for ranks in started.values()) < at_once, 180)
            started[name] = self.start(options, log / name)
        return {name: ranks.outcome(180) for name, ranks in started.items()}

    def codes(self, pids: Sequence[int]) -> list[int | None]:
        """Exit codes, negative for a signal; None for a rank that runs."""
        return self._ask({"ended": list(pids)})

    def _ask(self, question: dict) -> list:
        process = self._command.process
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of one run that a `Forked` process has started."""

    forked: Forked
    pids: list[int]
    log: Path

    def codes(self) -> list[int | None]:
        """As `Forked.codes`, by rank."""
        return self.forked.codes(self.pids)

    def running(self) -> bool:
        return None in self.codes()

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks, or to all, of those that run."""
        codes = self.codes()
        for rank in ranks or range(len(self.pids)):
            if codes[rank] is None:  # else it may be another process by now
                os.kill(self.pids[rank], number)

    def outcome(self, seconds: float) -> Outcome:
        """Wait for the end of all ranks.

        Raises:
            Hung: They took longer; then they are killed.
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
    """Seconds until ``condition`` held; fails after ``seconds``."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} seconds"
        time.sleep(0.1)
    return time.monotonic() - started


def rows(path: Path) -> list[dict]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


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
