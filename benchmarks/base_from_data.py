"""Train a base model from the data itself, for machines without a pretrained model.

python benchmarks/base_from_data.py OUT --train mixture.jsonl                        100 million parameters, for a GPU
python benchmarks/base_from_data.py OUT --train mixture.jsonl --layers 4 --width 128 --steps 300

A share of the rows (`--share`, half by default) trains the base model as plain text. The rest is written to
OUT/train.jsonl for fine-tuning, so that no arm of the learning benchmark trains on examples that the base has seen:

python benchmarks/learning.py run --model OUT --data maths=OUT/train.jsonl,held_out.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from colm_scale.base import BASE_MODEL
from colm_scale.config import DataConfig, ModelConfig
from colm_scale.data.examples import tokenise
from colm_scale.data.readers import read_rows
from colm_scale.modeling.load import load_tokenizer
from colm_scale.randomness import generator, global_draws


def make_model(layers: int, width: int, vocabulary: int, context: int, seed: int) -> LlamaForCausalLM:
    """A Llama with ``layers`` blocks of ``width`` and heads of size 64 (32 below a width of 256)."""
    heads = width // (64 if width >= 256 else 32)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    with global_draws(torch.device("cpu"), seed, "base from data"):
        return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokens: Tensor, steps: int, rows: int, rate: float, seed: int) -> float:
    """Train on random context-length windows of ``tokens`` ``[total]``; returns the mean loss of the last tenth."""
    device, context = model.device, model.config.max_position_embeddings
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    draw, losses = generator(seed, "base from data"), []
    for _ in range(steps):
        starts = torch.randint(len(tokens) - context, (rows,), generator=draw)
        batch = torch.stack([tokens[start : start + context] for start in starts.tolist()]).long().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-max(1, steps // 10) :])
    return float(last.mean())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", required=True, type=Path, help="a .jsonl file")
    parser.add_argument("--share", type=float, default=0.5, help="share of the rows for the base model")
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=16, help="windows per step")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    # Not splitlines, which also splits at other line separators within a text.
    lines = given.train.read_text(encoding="utf-8").rstrip("\n").split("\n")
    order = torch.randperm(len(lines), generator=generator(given.seed, "share of the base")).tolist()
    mine = int(given.share * len(lines))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, places in (("base.jsonl", order[:mine]), ("train.jsonl", order[mine:])):
        (given.out / name).write_text("".join(lines[place] + "\n" for place in sorted(places)), encoding="utf-8")

    tokenizer = load_tokenizer(ModelConfig())
    data = DataConfig(train=[str(given.out / "base.jsonl")])
    examples = tokenise(read_rows(data.train, data), tokenizer, data, given.context)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(given.layers, given.width, len(tokenizer), given.context, given.seed).to(device)
    loss = train(model, examples.tokens, given.steps, given.rows, given.rate, given.seed)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    facts = {"parameters": model.num_parameters(), "rows": mine, "steps": given.steps, "loss": loss}
    (given.out / "base.json").write_text(json.dumps(facts | {"tokenizer": BASE_MODEL.name}), encoding="utf-8")
    print(facts)


if __name__ == "__main__":
    main()
