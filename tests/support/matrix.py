"""The cells of docs/support.md: a tiny model of each family, trained by the product's own parts on two ranks.

    python -m support.matrix            run the cells that have no row, and write rows and page
    python -m support.matrix FAMILY...  run the cells of these families again
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from peft import PeftModel

from colm_scale.config import LoraConfig, ModelConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.data.sampler import CandidateSampler
from colm_scale.distributed.group import Group, PeerFailed
from colm_scale.engines.choose import loading_device, make_engine
from colm_scale.engines.ds_config import read_ds_config
from colm_scale.engines.tensors import collect
from colm_scale.errors import UserError
from colm_scale.modeling.load import load_model
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.profiling.memory import memory_meter
from colm_scale.profiling.spans import Spans
from colm_scale.run.assemble import build_model, build_step
from colm_scale.run.inputs import Inputs
from colm_scale.sketch import zeroth_order
from support import multimodal, worker
from support.cases import EPSILON, PAD, RATE, ROOT, VOCABULARY
from support.families import base_model, batch_of
from support.ranks import join, launch_ranks
from support.support_page import ALONE, ENGINES, FEATURES, Cell, cells, page
from support.zoo import ZOO

ROWS = ROOT / "docs" / "support.jsonl"
PAGE = ROWS.with_suffix(".md")
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
STEPS = 2
ROUNDING = 1e-5
"""Largest relative difference of a loss in float32: a sum of some hundred terms in another order, 2**-24 off each, seen
through adapters of which Adam has moved those with gradients of mere rounding by a learning rate."""


def run_cells(asked: list[Cell], folder: Path, timeout_seconds: float = 300) -> list[Cell]:
    """Run cells, on one process and on two, and compare them."""
    torch.set_num_threads(1)
    for family in {cell.family for cell in asked}:
        if not (folder / family).exists():
            base_model(family, vocab_size=VOCABULARY, **ZOO[family].options).save_pretrained(folder / family)
    references = list({(cell.family, ALONE, cell.feature): None for cell in asked})
    alone = _launched(1, references, folder, timeout_seconds)
    together = _launched(2, [cell.key for cell in asked if cell.engine != ALONE], folder, timeout_seconds)
    found = alone | together
    return [Cell(*cell.key, *_compared(found[cell.key], found[cell.family, ALONE, cell.feature])) for cell in asked]


def _launched(ranks: int, keys: list[tuple], folder: Path, timeout_seconds: float) -> dict[tuple, dict]:
    """The results of cells, of the first rank or the one that says why it failed. One that hangs is one that fails."""
    found: dict[tuple, dict] = {}
    while left := [key for key in keys if key not in found]:
        said, broken = Path(tempfile.mkdtemp(dir=folder)), ""
        try:
            launch_ranks(run_rank, ranks, left, said, timeout_seconds)
        except TimeoutError:
            broken = "hangs"
        except Exception as error:  # a rank has crashed
            broken = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        files = [said / f"rank{rank}" for rank in range(ranks)]
        by_rank = [[*map(json.loads, file.read_text().splitlines())] if file.exists() else [] for file in files]
        for key, *results in zip(left, *by_rank):
            found[key] = min(results, key=lambda result: result.get("error", "").startswith(PeerFailed.__name__))
        if (ended := min(map(len, by_rank))) < len(left):
            found[left[ended]] = {"error": broken}
    return found


def _compared(own: dict, reference: dict) -> tuple[str, str]:
    """Outcome and message of a cell."""
    if "refused" in own:
        return "refused", own["refused"]
    if "error" in own:
        return "fails", own["error"]
    if "steps" not in reference:
        return "fails", "trains, but one process does not"
    for number, (step, expected) in enumerate(zip(own["steps"], reference["steps"], strict=True), 1):
        if step["ids"] != expected["ids"]:
            return "fails", f"step {number} selects other examples than one process"
        if apart := _apart(step["loss"], expected["loss"]):
            return "fails", f"step {number} has another loss than one process, by {apart:.1g} of it"
    if apart := max(map(_apart, own["loaded"], own["trained"])):
        return "fails", f"the saved adapter computes other losses than the trained one, by {apart:.1g} of them"
    if not max(map(_apart, own["base"], own["trained"])):
        return "fails", "the adapter changes nothing"
    return "works", ""


def _apart(own: float, expected: float) -> float:
    """Relative distance beyond rounding, else 0."""
    apart = abs(own - expected) / abs(expected)
    return 0.0 if apart <= ROUNDING else apart


def run_rank(rank: int, world_size: int, port: int, keys: list[tuple], folder: str) -> None:
    """Main function of each process: writes a line for each cell as it ends."""
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    group = join(rank, world_size, port)
    with (Path(folder) / f"rank{rank}").open("w") as file:
        for key in keys:
            file.write(json.dumps(_tried(key, Path(folder).parent, group)) + "\n")
            file.flush()
    group.close()


def _tried(key: tuple, models: Path, group: Group) -> dict:
    family, engine, feature = key
    try:
        return _trained(_config(models / family, ENGINES[engine], FEATURES[feature]), group)
    except UserError as error:
        return {"refused": str(error).replace(str(models / family), family)}
    except Exception as error:  # whatever a library does not support
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}


def _config(model: Path, engine: str, options: dict[str, dict]) -> RunConfig:
    selection = {"candidates": 16, "budget": 8, "columns": 64, "probe": ZOO[model.name].probe}
    train = {"micro_batch_tokens": 96, "learning_rate": RATE, "seed": 5}
    return RunConfig(
        model=ModelConfig(name=str(model), **options.get("model", {})),
        selection=SelectionConfig(**selection | options.get("selection", {})),
        lora=LoraConfig(rank=8),
        train=TrainConfig(**train | options.get("train", {})),
        engine="fsdp" if engine == "fsdp" else "auto",
        ds_config=worker._ds_config(engine) if engine.startswith("zero") else None,
    )


def _trained(config: RunConfig, group: Group) -> dict:
    """Ids and losses of each step; losses of a batch after them, here and where plain peft has loaded the adapter."""
    data, ds_config = worker.examples(), read_ds_config(config, group.world_size)
    inputs = Inputs(
        tokenizer=SimpleNamespace(pad_token_id=PAD),
        sampler=CandidateSampler(data, config.selection.candidates, config.train.seed),
        source_names=data.source_names,
        sizes=data.sizes,
        kept=worker.kept(config.selection, data),
        protected=data.protected_sizes,
        digest="",
        eval=None,
        ds_config=ds_config,
    )
    module, weights, tap = build_model(config, loading_device(config, ds_config, group), group)
    engine = make_engine(config, ds_config, module, group, weights)
    with mock.patch.object(zeroth_order, "PERTURBATION", EPSILON):
        step = build_step(config, inputs, engine, tap, Spans(group.device, memory_meter(group)), group)
        reports = [step(number, RATE)[0] for number in range(1, STEPS + 1)]
    batch = batch_of([7, 5, 11])
    with torch.no_grad():
        trained = module.eval()(batch).tolist()
    saved, loaded, base = collect(engine, group)["adapter"], [], []
    if group.is_first:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            named = {label.removeprefix("model."): weight for label, weight in saved.items()}
            module.model.save_pretrained(folder, state_dict=named, save_embedding_layers=False)
            plain = _loaded(config, folder)
            loaded = plain(batch).tolist()
            with plain.model.disable_adapter():
                base = plain(batch).tolist()
    group.barrier()
    steps = [
        {"ids": report.candidates.ids[report.selection.positions].tolist(), "loss": report.loss} for report in reports
    ]
    return {"steps": steps, "trained": trained, "loaded": loaded, "base": base}


def _loaded(config: RunConfig, adapter: str) -> ExampleLoss:
    """The adapter on its base, as plain peft loads it."""
    if config.model.quantize == "none":
        sees = Path(config.model.name).name in multimodal.EVERY
        whole = transformers.AutoModelForMultimodalLM if sees else transformers.AutoModelForCausalLM
        base = whole.from_pretrained(config.model.name, dtype=torch.float32)
    else:  # bitsandbytes' layers would compute in bfloat16 on some CPUs
        base = load_model(config.model, torch.float32, torch.device("cpu"))
    return ExampleLoss(PeftModel.from_pretrained(base, adapter)).eval()


def versions() -> dict[str, str]:
    """What decides whether a cell works."""
    return {name: version(name).partition("+")[0] for name in PACKAGES}


def read_rows() -> tuple[dict[str, str], dict[tuple, Cell]]:
    """The committed versions, and the cells by key."""
    first, *others = ROWS.read_text("utf-8").splitlines() if ROWS.exists() else ["{}"]
    return json.loads(first), {cell.key: cell for cell in (Cell(**json.loads(line)) for line in others)}


def write_rows(found: dict[tuple, Cell]) -> None:
    ordered = [asdict(found[cell.key]) for cell in cells() if cell.key in found]
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in (versions(), *ordered)), "utf-8")


def main(families: list[str]) -> None:
    """Run what has no row, or these families again, and write rows and page."""
    measured, known = read_rows()
    found = {key: cell for key, cell in known.items() if measured == versions() and cell.family not in families}
    for family in ZOO:
        if left := [cell for cell in cells([family]) if cell.key not in found]:
            with tempfile.TemporaryDirectory() as folder:
                found |= {cell.key: cell for cell in run_cells(left, Path(folder))}
            print(family, dict(Counter(cell.outcome for cell in found.values() if cell.family == family)), flush=True)
            write_rows(found)
    PAGE.write_text(page(*read_rows()), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
