"""How well a model answers the validation examples.

In: a model, validation examples as token ids. Out: `Answered`, one an example, and the scores over all. Of a
classification the likeliest label word is the answer, its end included; of SQuAD v2 the likeliest token each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from jax_extract.inputs.benchmarks import UNANSWERABLE, Benchmark
from jax_extract.inputs.benchmarks_prompts import ANSWER_TOKENS
from jax_extract.pytorch.finetuning.examples import Collator, Encoder, Scored, Tokens
from jax_extract.pytorch.finetuning.scores import exact_match, f1, majority_share, p_value

SCORED_IN = "float32"  # as the weights are, whatever training computed in
_ROWS = 16  # that are computed at once


@dataclass(frozen=True)
class Answered:
    """What a model says to one validation example.

    Attributes:
      given: its answer.
      right: 1 where it is a right one (exact match), else 0.
      f1: of the words, for SQuAD v2.
    """

    sample_id: str
    answers: tuple[str, ...]
    given: str
    right: float
    f1: float | None = None

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


@torch.inference_mode()
def answer(model: Any, benchmark: Benchmark, encoder: Encoder, examples: Sequence[Scored]) -> list[Answered]:
    """The answers to examples, in their order."""
    was_training = model.training
    model.eval()
    try:
        ordered = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))  # little padding
        says = _classified if benchmark.label_words else _generated
        answered = dict(zip(ordered, says(model, benchmark, encoder, [examples[i] for i in ordered]), strict=True))
        return [answered[i] for i in range(len(examples))]
    finally:
        model.train(was_training)


def scores(benchmark: Benchmark, examples: Sequence[Scored], answered: Sequence[Answered]) -> dict[str, Any]:
    """The scores over all examples, and what chance would give: always the commonest class, or "unanswerable"."""
    right, samples = round(sum(each.right for each in answered)), len(answered)
    if benchmark.label_words:
        chance = majority_share([int(scored.example.label or 0) for scored in examples])
        found: dict[str, Any] = {"accuracy": right / samples}
    else:
        chance = sum(scored.example.answers == (UNANSWERABLE,) for scored in examples) / samples
        found = {"exact_match": right / samples, "f1": sum(each.f1 or 0.0 for each in answered) / samples}
    return {
        **found,
        "right": right,
        "samples": samples,
        "majority_share": chance,
        "p_value": p_value(right, samples, chance),
    }


def _classified(model: Any, benchmark: Benchmark, encoder: Encoder, examples: Sequence[Scored]) -> Iterator[Answered]:
    labels = len(benchmark.label_words)
    collate = Collator(encoder.padding)
    for start in range(0, len(examples), max(1, _ROWS // labels)):
        some = examples[start : start + max(1, _ROWS // labels)]
        batch = collate([Tokens.of(scored.prompt, word) for scored in some for word in scored.labels])
        likelihoods = _likelihoods(model, {name: values.to(model.device) for name, values in batch.items()})
        for scored, chosen in zip(some, likelihoods.view(-1, labels).argmax(dim=1).tolist(), strict=True):
            given = benchmark.label_words[chosen]
            yield Answered(
                scored.example.sample_id, scored.example.answers, given, float(chosen == scored.example.label)
            )


def _likelihoods(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 [batch]: the log-probability of each answer, its end included."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    learned = batch["labels"][:, 1:]
    rows, places = torch.nonzero(learned >= 0, as_tuple=True)
    chosen = logits[rows, places].float().log_softmax(dim=-1)[torch.arange(len(rows)), learned[rows, places]]
    return torch.zeros(len(learned), device=chosen.device).index_add(0, rows, chosen)


def _generated(model: Any, benchmark: Benchmark, encoder: Encoder, examples: Sequence[Scored]) -> Iterator[Answered]:
    from transformers import GenerationConfig

    # Of our own: a model's may ask for sampling.
    greedy = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=encoder.end, pad_token_id=encoder.padding
    )
    for start in range(0, len(examples), _ROWS):
        some = examples[start : start + _ROWS]
        ids, mask = _padded_left([scored.prompt for scored in some], encoder.padding)
        said = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=greedy
        )
        for scored, tokens in zip(some, said[:, ids.shape[1] :].tolist(), strict=True):
            given = encoder.text(tokens[: tokens.index(encoder.end)] if encoder.end in tokens else tokens)
            answers = scored.example.answers
            yield Answered(scored.example.sample_id, answers, given, exact_match(given, answers), f1(given, answers))


def _padded_left(prompts: Sequence[tuple[int, ...]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64 [prompts, longest]; what is generated follows the last token of each."""
    shape = len(prompts), max(map(len, prompts))
    ids, mask = torch.full(shape, padding), torch.zeros(shape, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    return ids, mask
