"""Ranks that read data once per host, each a process; what each found is written to ``rank<R>.json``."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch.multiprocessing as mp

from colm_scale.config import DataConfig, ModelConfig
from colm_scale.data import reading
from colm_scale.data.examples import tokenise
from colm_scale.data.reading import Reading
from colm_scale.distributed.connect import connect
from colm_scale.distributed.group import PeerFailed
from colm_scale.errors import UserError
from colm_scale.modeling.load import load_tokenizer
from colm_scale.run.host_data import once_per_host
from support.commands import free_port


@dataclasses.dataclass(frozen=True)
class Case:
    """What the two ranks read, and where they are.

    Attributes:
        hosts: Of each rank; ranks of a host share its cache.
    """

    data: str
    hosts: tuple[str, str] = ("one", "one")


def read_all(cases: dict[str, Case], folder: Path) -> list[dict[str, dict]]:
    """Let two new processes read every case in turn; returns what each rank found, by case."""
    arguments = (free_port(), cases, folder)
    mp.start_processes(_read_all, arguments, nprocs=2, start_method="forkserver")
    return [json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in range(2)]


def _read_all(rank: int, port: int, cases: dict[str, Case], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    group, tokenizer = connect(), load_tokenizer(ModelConfig())
    tokenised: list[int] = []

    def counting(*arguments):
        tokenised.append(1)
        return tokenise(*arguments)

    reading.tokenise = counting
    found = {}
    for name, case in cases.items():
        host = case.hosts[rank]
        os.environ["COLM_SCALE_CACHE"] = str(folder / host)
        group.local_rank, group.local_world_size = case.hosts[:rank].count(host), case.hosts.count(host)
        tokenised.clear()
        try:
            result = once_per_host(Reading("train", DataConfig(train=[case.data]), tokenizer, 64), group)
        except (UserError, PeerFailed) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        found[name] = {
            "digest": result.digest,
            "own_digest": result.examples.digest(),
            "rows_digest": result.rows_digest,
            "file": result.file,
            "mapped": result.file in Path("/proc/self/maps").read_text("utf-8"),
            "tokenised": len(tokenised),
        }
    (folder / f"rank{rank}.json").write_text(json.dumps(found), "utf-8")
    group.close()
