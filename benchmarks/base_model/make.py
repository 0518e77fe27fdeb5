"""Make the base model again: ``python benchmarks/base_model/make.py [--out DIR] [--minutes N | --steps N]``.

The corpus is drawn on the fly, so that no data is needed. With ``--steps``, a run is reproducible on one machine and
number of threads; with ``--minutes``, it makes as many steps as fit.
"""

from __future__ import annotations

import argparse
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import tokenizers
import torch
import transformers
from corpus import documents, fact
from prose import SENTENCES
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from colm_scale.base import BASE_MODEL

VOCABULARY = 1024
SPECIAL = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = 0, 1, 2
ROWS, ROW_TOKENS = 32, 128
PEAK_LR, WARMUP, FINAL_LR_FRACTION = 4e-3, 100, 0.02
TOKENIZER_DOCUMENTS = 6_000
LOG_EVERY = 50
# Each turn is on its own line; the end token closes turns of the assistant, so that an answer can end.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\\n' }}{{ m['role'] }}: {{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '\\nassistant: ' if add_generation_prompt else '' }}"
)
# Every digit is a piece of its own, so that numbers are read digit by digit; an operator includes the spaces around it,
# which shortens arithmetic; a word includes the space before it.
PIECES = r"[0-9]| ?[=+\-*/%<>]+ ?| ?\p{L}+| ?[^\s\p{L}0-9=+\-*/%<>]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a run: optimizer steps, tokens, seconds, and mean loss (nats per token) of the last 50 steps."""

    steps: int
    tokens: int
    seconds: float
    loss: float


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 1,024 tokens that encodes any text and adds no special tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    # The prose is repeated until it weighs about as much as the corpus, which has few distinct words.
    texts = [*islice(documents(seed), TOKENIZER_DOCUMENTS), *(SENTENCES * 40)]
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=SPECIAL[PAD], bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS],
        clean_up_tokenization_spaces=False, model_max_length=1024, chat_template=CHAT_TEMPLATE)


def make_model(seed: int) -> LlamaForCausalLM:
    """Create the untrained model, 1.74 million parameters in float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=EOS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Tensor]:
    """Draw an endless stream of ``[32, 128]`` token ids.

    Each row begins at the start of a document, as in fine-tuning, and is filled with documents that end in eos; the
    rest of the last one is dropped.
    """
    source = documents(seed)
    ready: list[list[int]] = []
    rows: list[list[int]] = []
    row: list[int] = []
    while True:
        if not ready:
            ready = tokenizer(list(islice(source, 512)))["input_ids"]
        row += [*ready.pop(), EOS]
        if len(row) >= ROW_TOKENS:
            rows.append(row[:ROW_TOKENS])
            row = []
        if len(rows) == ROWS:
            yield torch.tensor(rows)
            rows = []


def learning_rate(progress: float, step: int) -> float:
    """Compute the rate: warm-up over 100 steps, then a cosine; ``progress`` is the finished part of the run, 0..1."""
    warm = min(1.0, (step + 1) / WARMUP)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return PEAK_LR * warm * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * cosine)


def train(model: LlamaForCausalLM, data: Iterator[Tensor], steps: int | None, minutes: float) -> Outcome:
    """Train ``model`` in place for ``steps`` steps or, if they are None, for ``minutes`` minutes."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
                                  lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    model.train()
    start, step, losses = time.monotonic(), 0, []
    while True:
        seconds = time.monotonic() - start
        progress = step / steps if steps is not None else seconds / (60 * minutes)
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step)
        rows = next(data)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        step += 1
        if step % LOG_EVERY == 0:
            recent = sum(losses[-LOG_EVERY:]) / LOG_EVERY
            rate = step * ROWS * ROW_TOKENS / (time.monotonic() - start)
            print(f"step {step}  {progress:.0%}  loss {recent:.4f}  {rate:,.0f} tokens/s", flush=True)
    last = losses[-LOG_EVERY:]
    return Outcome(step, step * ROWS * ROW_TOKENS, time.monotonic() - start, sum(last) / max(1, len(last)))


@torch.no_grad()
def fact_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, count: int = 200) -> float:
    """Measure the share of ``count`` facts such as ``17 + 25 = 42`` whose result greedy decoding completes."""
    rng, right = Random(f"{seed}:fact accuracy"), 0
    model.eval()
    facts = (text for text in iter(lambda: fact(rng), None) if text.count(" = ") == 1)
    for text in islice(facts, count):
        question, _, result = text.rpartition("= ")
        # The prompt starts like a document of the corpus, in which a line break or eos follows the result.
        ids = tokenizer(question + "= ", return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(result) + 1, do_sample=False)
        completion = tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
        right += completion.strip() == result or completion.startswith(result + "\n")
    return right / count


README = """# Base model of colm_scale

A Llama model of {parameters:,} parameters (hidden 128, 8 layers, 4 heads, intermediate 352, tied embeddings, float16)
with a byte-level BPE tokenizer of 1,024 tokens in which every digit is a token. It was trained from scratch on the
synthetic corpus of `benchmarks/base_model/corpus.py` (arithmetic, assignments, equations, word problems) and on
nothing else. It is a test subject for fine-tuning, not a useful model: it knows small numbers and very little English.

Made by `python benchmarks/base_model/make.py {arguments}`.

| | |
|---|---|
| seed | {seed} |
| steps | {steps:,} of {rows} x {row_tokens} tokens |
| tokens | {tokens:,} |
| seconds of training | {seconds:,.0f} ({rate:,.0f} tokens/s, {threads} threads) |
| final loss | {loss:.4f} nats per token, mean of the last 50 steps |
| optimizer | AdamW, peak learning rate {lr}, {warmup} warm-up steps, cosine |
| facts such as `17 + 25 = ` completed | {accuracy:.1%} of 200 |
| versions | Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers} |
"""


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, readme: str, out: Path) -> None:
    """Write to a temporary folder and rename it, so that ``out`` never holds half a model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".base-") as scratch:
        folder, old = Path(scratch) / "new", Path(scratch) / "old"
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        if out.exists():
            shutil.move(out, old)
        shutil.move(folder, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    program = "python benchmarks/base_model/make.py"
    parser = argparse.ArgumentParser(prog=program, description="Makes the base model again.")
    parser.add_argument("--out", type=Path, default=BASE_MODEL, help="folder to write (default: the shipped one)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=25.0, help="how long to train (default: 25)")
    length.add_argument("--steps", type=int, help="optimizer steps, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    tokenizer, model = make_tokenizer(given.seed), make_model(given.seed)
    done = train(model, batches(tokenizer, given.seed), given.steps, given.minutes)
    accuracy = fact_accuracy(model, tokenizer, given.seed)
    length_given = f"--steps {given.steps}" if given.steps is not None else f"--minutes {given.minutes:g}"
    readme = README.format(
        parameters=sum(p.numel() for p in model.parameters()), seed=given.seed, steps=done.steps, rows=ROWS,
        row_tokens=ROW_TOKENS, tokens=done.tokens, seconds=done.seconds, rate=done.tokens / max(done.seconds, 1e-9),
        threads=given.threads, loss=done.loss, lr=PEAK_LR, warmup=WARMUP, accuracy=accuracy,
        arguments=f"{length_given} --seed {given.seed} --threads {given.threads}", python=platform.python_version(),
        torch=torch.__version__, transformers=transformers.__version__, tokenizers=tokenizers.__version__)
    write(model, tokenizer, readme, given.out)
    print(f"{given.out}: {done.steps} steps, loss {done.loss:.4f}, {accuracy:.1%} of the facts")


if __name__ == "__main__":
    main()
