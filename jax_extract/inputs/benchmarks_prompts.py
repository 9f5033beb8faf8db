"""Prompts of benchmark examples that fit: the long text is shortened, the question behind it never.

In: `Example`s, and a function that counts the tokens of a text. Out: prompts of at most so many tokens, which depend
on nothing else (not on the answer, nor on the model's training), so that training, scoring and extraction see the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.benchmarks import Benchmark, Example
from jax_extract.inputs.samples import Sample

ANSWER_TOKENS = 32  # of a prompt's room that are kept for the answer, the same for all tasks

CountTokens = Callable[[str], int]


def prompt_ids(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """With the special tokens that begin a text; some tokenizers end it too, which a prompt must not."""
    ids = tuple(tokenizer(prompt)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def prompt_token_counter(tokenizer: Any) -> CountTokens:
    """What prompts are fitted with, in training, scoring and extraction."""
    return lambda prompt: len(prompt_ids(tokenizer, prompt))


def fitted_prompt(benchmark: Benchmark, example: Example, count_tokens: CountTokens, max_length: int) -> str:
    """The prompt of `fitted_texts`."""
    return benchmark.prompt(fitted_texts(benchmark, example, count_tokens, max_length))


def fitted_texts(
    benchmark: Benchmark, example: Example, count_tokens: CountTokens, max_length: int
) -> Mapping[str, str]:
    """The long text cut at the end so that the prompt has at most `max_length` − `ANSWER_TOKENS` tokens.

    Raises:
      UserError: the rest of it is too long already.
    """
    most = max_length - ANSWER_TOKENS
    if count_tokens(benchmark.prompt(example.texts)) <= most:
        return example.texts
    text = example.texts[benchmark.long_text]

    def shortened(characters: int) -> dict[str, str]:
        return {**example.texts, benchmark.long_text: text[:characters].rstrip()}

    def tokens_of(characters: int) -> int:
        return count_tokens(benchmark.prompt(shortened(characters)))

    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if tokens_of(middle) <= most:
            fits = middle
        else:
            too_long = middle
    if fits == 0 and (tokens := tokens_of(0)) > most:
        raise UserError(
            f"sample {example.sample_id!r} of {benchmark.name} has {tokens} tokens without its {benchmark.long_text}, "
            f"and {most} fit; raise --max_length to {tokens + ANSWER_TOKENS} or more"
        )
    return shortened(fits)


def prompt_samples(
    benchmark: Benchmark, examples: Iterable[Example], count_tokens: CountTokens, max_length: int
) -> Iterator[Sample]:
    """The prompts as samples, for extraction; the answers are in `meta`."""
    for example in examples:
        meta = {"task": benchmark.name, "label": example.label, "answers": list(example.answers)}
        yield Sample(example.sample_id, fitted_prompt(benchmark, example, count_tokens, max_length), meta)
