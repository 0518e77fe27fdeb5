"""CoLM in your own training loop: python docs/examples/plain_loop.py DATA.jsonl [MODEL] [STEPS]

Each row of DATA has ``prompt``, ``completion`` and ``source``. MODEL defaults to the small base in the package.
"""

import json
import sys
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from colm_scale.base import BASE_MODEL
from colm_scale.integrations import CoresetSelector, SelectionConfig


def main(data: str, name: str = str(BASE_MODEL), steps: str = "20") -> list[float]:
    rows = [json.loads(line) for line in Path(data).read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))

    def collate(batch: list[dict]) -> dict[str, object]:
        ids, labels = [], []
        for row in batch:
            prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
            completion = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids.append(torch.tensor(prompt + completion))
            labels.append(torch.tensor([-100] * len(prompt) + completion))
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        padded = pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)
        sources = [row["source"] for row in batch]
        return {"input_ids": padded[0], "labels": padded[1], "attention_mask": mask, "source": sources}

    loader = DataLoader(rows, batch_size=32, shuffle=True, drop_last=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selection = SelectionConfig(candidates=32, budget=16)
    selector = CoresetSelector(model, selection, Counter(row["source"] for row in rows))
    losses = []
    for batch in islice(cycle(loader), int(steps)):
        coreset = selector.select(batch)
        for micro_batch in coreset.micro_batches:
            selector.loss(micro_batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        report = selector.finish()
        losses.append(report.loss)
        print(f"step {report.step}: loss {report.loss:.3f} on {len(report.selection)} of {len(report.candidates)}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
