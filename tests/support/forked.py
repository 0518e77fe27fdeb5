"""``python forked.py FOLDER COUNT``: runs of ``launchers/train.py``, COUNT at once, forked from a process that has
imported what they need.

``FOLDER/jobs.json`` names the options of each; FOLDER gets their output and ``codes.json`` their exit codes.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import colm_scale.trainer  # noqa: E402, F401
from support.sabotage import main  # noqa: E402


def start(folder: Path, name: str, options: list[str]) -> int:
    """The process id of a run, in the parent; the child becomes the run and does not return."""
    pid = os.fork()
    if pid == 0:
        for descriptor, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = [str(ROOT / "launchers/train.py"), *options]
        os._exit(code_of_run())
    return pid


def code_of_run() -> int:
    """Run, and leave out only the interpreter's clearing up of all that was imported, which takes a second."""
    try:
        main()
    except SystemExit as end:
        return end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_all(folder: Path, jobs: dict[str, list[str]], at_once: int) -> dict[str, int]:
    """The exit code of every run."""
    waiting, running, codes = list(jobs.items()), {}, {}
    while waiting or running:
        while waiting and len(running) < at_once:
            name, options = waiting.pop(0)
            running[start(folder, name, options)] = name
        pid, status = os.wait()
        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
    return codes


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    jobs = json.loads((folder / "jobs.json").read_text("utf-8"))
    (folder / "codes.json").write_text(json.dumps(run_all(folder, jobs, int(sys.argv[2]))), "utf-8")
