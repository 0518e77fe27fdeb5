"""Held-out loss and exact match per source, distributed over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationMixin, PreTrainedTokenizerBase

from colm_scale.config import EvalConfig, TrainConfig
from colm_scale.data.answers import is_correct
from colm_scale.data.batching import collate
from colm_scale.data.examples import Examples
from colm_scale.distributed.group import Group
from colm_scale.modeling.compiling import uncompiled
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import without_dropout
from colm_scale.profiling.memory import free_cached
from colm_scale.randomness import generator
from colm_scale.records import Batch, long_tensor, on_device
from colm_scale.reporting.summary import Evaluation, HeldOutLoss
from colm_scale.selection.route import deal, form_micro_batches

_TOKENS_PER_TRAINED = 4
"""Tokens that fit into a forward without a graph, as a multiple of those of a training micro-batch."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The data of an evaluation.

    Attributes:
        examples: Their sources are numbered as in the training data, with unseen ones after those.
        train_sizes: ``[Q]`` training examples per source, for the mean over the natural mixture.
        small: ``[Q]`` bool, the sources reported as small (by the default kept-source rule).
        tokenizer: Decodes the answers.
    """

    examples: Examples
    train_sizes: Tensor
    small: Tensor
    tokenizer: PreTrainedTokenizerBase


class NoEvaluator:
    """The evaluator of a run without held-out examples."""

    evaluates = False
    left_out: Mapping[str, Mapping[str, int]] = MappingProxyType({})

    def __call__(self, module: ExampleLoss, step: int, *, whole: bool) -> Evaluation:
        raise AssertionError("there are no held-out examples")


class HeldOutEvaluator:
    """Evaluates a model on the held-out examples, or on a sample of them that is the same every time.

    Args:
        entered: Called with a name for each micro-batch, see `Watch.enter`.
        gathered: A context for generating, see `Engine.gathered`.

    Attributes:
        left_out: Examples that are not evaluated whole, by reason and source.
    """

    evaluates = True

    def __init__(
        self,
        held_out: HeldOut,
        config: EvalConfig,
        train: TrainConfig,
        group: Group,
        entered: Callable[[str], None] = lambda _: None,
        gathered: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(True),
    ):
        self._examples, self._tokenizer = held_out.examples, held_out.tokenizer
        self._config, self._group = config, group
        self._train_sizes, self._small, self._entered = held_out.train_sizes, held_out.small, entered
        self._gathered = gathered
        self._budget = _TOKENS_PER_TRAINED * train.micro_batch_tokens
        examples = held_out.examples
        chosen = [self._draw(source, config.limit, train.seed) for source in range(len(examples.source_names))]
        each = max(1, config.sample // sum(len(of_source) > 0 for of_source in chosen))
        self._scored = torch.cat(chosen).sort().values
        self._sample = torch.cat([of_source[:each] for of_source in chosen]).sort().values
        self._generated = torch.cat([of_source[: config.generate] for of_source in chosen]).sort().values
        drawn = zip(examples.source_names, examples.sizes.tolist(), map(len, chosen))
        self.left_out = {
            "held-out examples too long or without anything to learn, dropped": examples.dropped,
            "held-out examples too long, cut": examples.cut,
            "held-out examples of which the chat template leaves something out": examples.left_out,
            "held-out examples above --eval.limit, not evaluated": {n: size - k for n, size, k in drawn if size > k},
        }

    def __call__(self, module: ExampleLoss, step: int, *, whole: bool = True) -> Evaluation:
        """Evaluate. Whole: the loss of all examples, and generated answers; otherwise the loss of the sample."""
        scored = self._scored if whole else self._sample
        with torch.no_grad(), without_dropout(module):
            losses = self._losses(module, scored)
            correct = self._correct(module, self._generated if whole else self._generated[:0])
        free_cached(self._group.device)
        return self._evaluation(step, scored, losses, correct)

    def _losses(self, module: ExampleLoss, scored: Tensor) -> Tensor:
        """Compute ``[N]`` float64 losses, NaN where not ``scored``."""
        losses = torch.zeros(len(self._examples), device=self._group.device)
        lengths, packed = self._examples.lengths, module.packs
        micro_batches = form_micro_batches(lengths, scored, self._budget, packed=packed)
        shares = deal(micro_batches, lengths, self._group.world_size, packed=packed)
        for indices in shares[self._group.rank]:
            self._entered("evaluate")
            batch = self._batch(indices or (int(scored[0]),), packed)
            found = module(batch)
            if indices:
                losses[on_device(batch.positions, losses.device)] = found
        return self._combined(losses, scored)

    def _correct(self, module: ExampleLoss, chosen: Tensor) -> Tensor:
        """Generate answers; return ``[N]`` float64, 1 for a correct one, 0 for a wrong one, NaN if not ``chosen``."""
        correct = torch.zeros(len(self._examples), device=self._group.device)
        if len(chosen):
            prompts = {int(i): self._examples.prompt_and_reference(int(i)) for i in chosen}
            lengths = torch.zeros(len(self._examples), dtype=torch.int64)
            lengths[chosen] = long_tensor([len(prompts[int(i)][0]) for i in chosen])
            lengths += self._config.max_new_tokens
            micro_batches = form_micro_batches(lengths, chosen, self._budget)
            own = deal(micro_batches, lengths, self._group.world_size)[self._group.rank]
            with self._gathered() as independent:
                for indices in own:
                    self._entered("generate")
                    # Where each token gathers weights from all ranks, one with nothing to generate still takes part.
                    taken = indices if independent else indices or (int(chosen[0]),)
                    answers = self._generate(module, [prompts[i][0] for i in taken], lockstep=not independent)
                    for index, answer in zip(indices, answers):
                        reference = self._tokenizer.decode(prompts[index][1], skip_special_tokens=True)
                        assert isinstance(reference, str)
                        correct[index] = is_correct(answer, reference)
        return self._combined(correct, chosen)

    def _generate(self, module: ExampleLoss, prompts: list[list[int]], *, lockstep: bool) -> list[str]:
        """Complete prompts greedily, padded on the left; in lockstep, as many tokens on every rank."""
        if not prompts:
            return []
        longest = max(map(len, prompts))
        pad_id = self._tokenizer.pad_token_id
        tokens = torch.full((len(prompts), longest), pad_id)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.as_tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        model = module.model
        assert isinstance(model, PeftModel | GenerationMixin)
        with uncompiled():  # blocks are not compiled for single tokens on growing caches
            generated = model.generate(
                input_ids=on_device(tokens, self._group.device),
                attention_mask=on_device(mask, self._group.device),
                max_new_tokens=self._config.max_new_tokens,
                do_sample=False,
                num_beams=1,
                synced_gpus=lockstep and self._group.world_size > 1,
                pad_token_id=pad_id,
                eos_token_id=sorted(self._ends(module)),
            )
        answers: list[str] = self._tokenizer.batch_decode(generated[:, longest:].cpu(), skip_special_tokens=True)
        return answers

    def _ends(self, module: ExampleLoss) -> set[int]:
        """Return the end tokens of the tokenizer and of the model (such as a chat model's end of turn)."""
        of_model = module.model.generation_config.eos_token_id
        return {self._tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])} - {None}

    def _evaluation(self, step: int, scored: Tensor, losses: Tensor, correct: Tensor) -> Evaluation:
        found, sources = self._means(losses, scored), self._examples.sources
        answered = {
            name: correct[(sources == q) & ~correct.isnan()]
            for q, name in enumerate(self._examples.source_names)
            if name in found.losses
        }
        accuracies = {name: float(of.mean()) if len(of) else None for name, of in answered.items()}
        known = [float(of.mean()) for of in answered.values() if len(of)]
        return Evaluation(
            step=step,
            losses=found.losses,
            accuracies=accuracies,
            counts=found.counts,
            loss=found.loss,
            loss_by_source=found.loss_by_source,
            small_loss=found.small_loss,
            accuracy=sum(known) / len(known) if known else None,
            whole=len(scored) == len(self._scored),
            sample=self._means(losses, self._sample),
        )

    def _means(self, losses: Tensor, chosen: Tensor) -> HeldOutLoss:
        """Average ``[N]`` losses over ``chosen`` examples."""
        names, sources = self._examples.source_names, self._examples.sources
        own = torch.full_like(losses, float("nan"))
        own[chosen] = losses[chosen]
        present = [q for q in range(len(names)) if (sources[chosen] == q).any()]
        loss = {q: float(own[sources == q].nanmean()) for q in present}
        sizes = [int(self._train_sizes[q]) if q < len(self._train_sizes) else 0 for q in present]
        small = [q for q in present if q < len(self._small) and self._small[q]]
        return HeldOutLoss(
            losses={names[q]: loss[q] for q in present},
            counts={names[q]: int((sources[chosen] == q).sum()) for q in present},
            loss=sum(loss[q] * size for q, size in zip(present, sizes)) / sum(sizes) if sum(sizes) else None,
            loss_by_source=sum(loss.values()) / len(present),
            small_loss=sum(loss[q] for q in small) / len(small) if small else None,
        )

    def _batch(self, indices: tuple[int, ...], packed: bool) -> Batch:
        chosen, pad_id = long_tensor(indices), self._tokenizer.pad_token_id
        return collate(self._examples, chosen, chosen, pad_id, self._group.device, packed=packed)

    def _draw(self, source: int, limit: int, seed: int) -> Tensor:
        """Draw up to ``limit`` examples of a source. Rank-equal."""
        of_source = (self._examples.sources == source).nonzero().flatten()
        order = torch.randperm(len(of_source), generator=generator(seed, "eval", source))
        return of_source[order[:limit]]

    def _combined(self, values: Tensor, where: Tensor) -> Tensor:
        """Sum the values of all ranks; NaN outside ``where``."""
        total = self._group.all_reduce(values, "eval").cpu().double()
        result = torch.full_like(total, float("nan"))
        result[where] = total[where]
        return result


Evaluator = HeldOutEvaluator | NoEvaluator
