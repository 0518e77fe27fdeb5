"""``python forked.py``: fork ranks of ``launchers/train.py`` or another command from a process with all imports.

Each line of standard input is a request, answered by a line of standard output:

    {"words": [...], "log": PATH, "ranks": [{variable: value}, ...]}    process id of each started rank
    {"ended": [process id, ...]}                                        exit code of each, null if it runs

The words are arguments of ``colm-scale``; a run, ``train ...``, may be sabotaged. The output of all ranks goes to
``PATH.stdout`` and ``PATH.stderr``. The process ends with its standard input.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # output during imports is not an answer
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # like the command line before its imports

import deepspeed  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import colm_scale.run.train  # noqa: E402, F401
from colm_scale.cli.main import main  # noqa: E402
from support import sabotage  # noqa: E402


def start(words: list[str], log: str, variables: dict[str, str]) -> int:
    """Fork a rank: returns its process id in the parent; the child does not return."""
    pid = os.fork()
    if pid == 0:
        for descriptor, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{log}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.close(_answers.fileno())
        os.environ.update(variables)
        os._exit(code_of_run(words))
    return pid


def code_of_run(words: list[str]) -> int:
    """Run the command, and skip the interpreter's cleanup, which takes a second."""
    command, *options = words
    sys.argv = [str(ROOT / "launchers/train.py"), *options] if command == "train" else ["colm-scale", *words]
    try:
        if command == "train":
            sabotage.main()
        main(words)
    except SystemExit as end:
        return end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def exit_code(pid: int) -> int | None:
    if pid not in _codes:
        ended, status = os.waitpid(pid, os.WNOHANG)
        _codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
    return _codes[pid] if _codes[pid] is not None else _codes.pop(pid)


_codes: dict[int, int | None] = {}


def answer(question: dict) -> list[int | None]:
    if "ended" in question:
        return [exit_code(pid) for pid in question["ended"]]
    return [start(question["words"], question["log"], variables) for variables in question["ranks"]]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=_answers, flush=True)
