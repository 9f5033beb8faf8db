"""A batch of prompts, answered step by step.

In: a program, prompts as they are read, how long answers may be. Out: their tokens, some of every answer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np

from jax_extract.devices.exhaustion import refusing_exhaustion
from jax_extract.errors import UserError
from jax_extract.forward.edits import Edits, Placed
from jax_extract.generation.answers import Answer
from jax_extract.generation.program import NO_TOKEN, STEPS, AnswerProgram
from jax_extract.generation.reading import Reading
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.weights.open_model import OpenModel

_NO_TOKEN_BEYOND = 2**31


@refusing_exhaustion()
def answered(
    program: AnswerProgram,
    reading: Reading,
    prompt_columns: int,
    most: int,
    edits: Edits | None = None,
    count: Callable[[int, int], None] = lambda _read, _written: None,
    around: Callable[[tuple[int, ...]], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Iterator[np.ndarray]:
    """int32 [rows, STEPS] until all answers have ended or have `most` tokens.

    Args:
      prompt_columns: room for a prompt.
      edits: that are made.
      count: is told tokens of prompts that were read, and tokens that were written.
      around: a step, of which one program is compiled for each of the shapes that this is given.
    """
    lengths, samples = (np.zeros(reading.devices * reading.rows, np.int32) for _ in range(2))
    for place, prompt in reading.prompts():
        lengths[place], samples[place] = prompt.length, prompt.sample_index
    room = -(-most // STEPS) * STEPS
    state = program.start(lengths, samples, prompt_columns, prompt_columns + room)
    edits = edits or Edits((), 0)
    for slabs in reading.steps():
        made = edits.interventions(slabs.placed, slabs.tokens.shape, reading.devices, slabs.lengths.shape[1])
        with around((*slabs.tokens.shape, *slabs.lengths.shape, len(lengths), prompt_columns + room)):
            state = program.read(state, slabs.tokens, slabs.lengths, slabs.rows, made)
            jax.block_until_ready(state.token)  # what is told to be read has been
        count(int(slabs.lengths.sum()), 0)
    state = program.ready(state)
    placed = [Placed(place, 0, prompt) for place, prompt in reading.prompts()]
    following = edits.while_answering(placed, len(lengths), room)
    for at in range(0, most, STEPS):
        with around((len(lengths), prompt_columns + room)):
            state, told, unfinished = program.answer(state, following)
            piece = np.asarray(told)
        count(0, int(np.sum(piece[:, : most - at] != NO_TOKEN)))
        yield piece
        if not int(unfinished):
            return


def answer_of(model: OpenModel, stops: tuple[int, ...], sample: TokenizedSample, row: np.ndarray) -> Answer:
    """`row` int32 [tokens], NO_TOKEN behind its end."""
    tokens = tuple(int(token) for token in row[row != NO_TOKEN])
    ended = bool(tokens) and tokens[-1] in stops
    text = model.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return Answer(sample.sample_index, sample.sample_id, sample.length, tokens, ended, text)


def stop_tokens(model: OpenModel) -> tuple[int, ...]:
    """The tokens that end an answer, as the model says, else its tokenizer."""
    checkpoint = model.checkpoint
    for where, said in (("generation_config.json", checkpoint.generation), ("config.json", checkpoint.config)):
        if (found := said.get("eos_token_id")) is None:
            continue
        tokens = tuple(found) if isinstance(found, list) else (found,)
        if not all(type(token) is int and 0 <= token < _NO_TOKEN_BEYOND for token in tokens):
            raise UserError(
                f"{where} of {checkpoint.source} has eos_token_id {found!r:.40}; expected a token id, or a list of them"
            )
        return tokens
    end = model.tokenizer.eos_token_id
    return () if end is None else (int(end),)
