"""``launchers/train.py`` in which something goes wrong: ``--sabotage`` at the end of the options says what.

``@RANK`` in any option becomes the rank, so that ranks can be made to read different files.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from colm_scale import cli
from colm_scale.data.sampler import CandidateSampler
from colm_scale.distributed.engine import TorchEngine
from colm_scale.records import Batch, Candidates
from colm_scale.sketch.tap import Tap
from colm_scale.step import CoresetStep

RANK = os.environ.get("RANK", "0")
BAD_ID = 5
"""The training example whose loss is made NaN."""


def fail_on_rank_1(fail: Callable[[], None]) -> None:
    """Rank 1 calls ``fail`` in the middle of step 2, when rank 0 is on its way into a collective."""
    train, calls = CoresetStep._train, []

    def sabotaged(self, micro_batches, n: int) -> Tensor:
        calls.append(n)
        if RANK == "1" and len(calls) == 2:
            fail()
        return train(self, micro_batches, n)

    CoresetStep._train = sabotaged


def raise_error() -> None:
    raise RuntimeError("the disk of rank 1 burns")


def bad_rows(first_step: int) -> Callable[[Batch], Tensor]:
    """Which rows of a batch are the example `BAD_ID`; none before ``first_step``."""
    draw, drawn = CandidateSampler.__call__, []

    def remember(self, step: int) -> Candidates:
        drawn[:] = [draw(self, step)]
        return drawn[0]

    CandidateSampler.__call__ = remember
    return lambda batch: (drawn[0].ids[batch.positions] == BAD_ID) & (drawn[0].step >= first_step)


def nan_candidate() -> None:
    """One candidate's loss and gradient are NaN while it is sketched."""
    factors, is_bad = Tap.factors, bad_rows(first_step=1)

    def sabotaged(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        losses, delta, a = factors(self, batch)
        losses[: len(batch.positions)][is_bad(batch)] = torch.nan
        delta[: len(batch.positions)][is_bad(batch)] = torch.nan
        return losses, delta, a

    Tap.factors = sabotaged


def nan_training() -> None:
    """One example's loss is NaN while it is trained, from step 2 on."""
    forward, is_bad = TorchEngine.forward, bad_rows(first_step=2)
    TorchEngine.forward = lambda self, batch: forward(self, batch).masked_fill(is_bad(batch), torch.nan)


SABOTAGES = {
    "raise": lambda: fail_on_rank_1(raise_error),
    "exit": lambda: fail_on_rank_1(lambda: os._exit(3)),
    "kill": lambda: fail_on_rank_1(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "nan_candidate": nan_candidate,
    "nan_training": nan_training,
}


def main() -> None:
    """Run with the options of the command line."""
    options = [option.replace("@RANK", RANK) for option in sys.argv[1:]]
    if "--sabotage" in options:
        SABOTAGES[options[options.index("--sabotage") + 1]]()
        options = options[: options.index("--sabotage")]
    cli.train(options)


if __name__ == "__main__":
    main()
