"""What a caller asks of a loaded model, checked and made plain: texts, what is captured, logits, answers.

In: the caller's words. Out: tokenised samples, a capture plan, positions; everything that cannot be done is refused
here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.token_table import PROMPT_TOKENS, TokenizedSample
from jax_extract.inputs.tokenize import tokenize
from jax_extract.inputs.tokenizing.counts import InputCounts
from jax_extract.inputs.wrapping import Kept, Wrapping
from jax_extract.layer_words import layer_words, layers_there
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import CapturePlan
from models.hooks import HOOK_POINTS, is_glob, resolve_hook_points
from models.ports import longest_sample
from models.positions import Positions

Text = str | Sequence[int] | np.ndarray  # or its token ids
Texts = Text | Sequence[Text] | Mapping[str, Text]
Capture = Mapping[str, Any] | Iterable[str] | str | None
LogitPositions = str | Sequence[int] | None

_LARGEST_TOKEN = 2**31 - 1
_ALL = "all"


def named_inputs(texts: Texts) -> Iterator[Sample]:
    """Texts, or token ids, with their ids where they are a mapping; else these are "0", "1", …; one may come alone."""
    given: Any = [texts] if isinstance(texts, str) or is_token_ids(texts) else _arrays(texts)
    if isinstance(given, bytes) or not (isinstance(given, Mapping | Sequence) or _has_rows(given)):
        raise UserError(f"texts are a list of strings or of token ids, or a mapping of ids to them, not {texts!r:.60}")
    named = given.items() if isinstance(given, Mapping) else ((str(i), text) for i, text in enumerate(given))
    for name, text in named:
        if not isinstance(name, str):
            raise UserError(f"the ids of texts are strings, not {name!r:.60}")
        if isinstance(text, str):
            yield Sample(name, text)
        elif is_token_ids(text):
            yield Sample(name, "", token_ids=tuple(int(token) for token in text))
        else:
            raise UserError(f"text {name!r} is neither a string nor a list of token ids: {text!r:.60}")


def is_token_ids(given: Any) -> bool:
    """A list of whole numbers, or an array or tensor of them with one axis."""
    if isinstance(given := _array(given), np.ndarray):
        return given.ndim == 1 and np.issubdtype(given.dtype, np.integer)
    if isinstance(given, bytes) or not isinstance(given, Sequence):
        return False
    return len(given) > 0 and all(isinstance(token, Integral) for token in given)


def for_each(given: Any, prompts: Sequence[TokenizedSample], what: str) -> list[Any]:
    """One for each prompt, of a list or of a mapping by their ids; UserError where they are others."""
    if isinstance(given := _arrays(given), Mapping):
        ids = [prompt.sample_id for prompt in prompts]
        if set(given) != set(ids):
            raise UserError(
                f"{what} are given for {list(given)!r:.60}, and the texts are {ids!r:.60}; give one for each"
            )
        return [given[name] for name in ids]
    if not isinstance(given, Sequence) and not _has_rows(given):
        raise UserError(f"{what} are a list, or a mapping of the texts' ids to them, not {given!r:.60}")
    if len(given) != len(prompts):
        raise UserError(f"{len(given)} {what} were given for {len(prompts)} texts; give one for each")
    return list(given)


def _has_rows(given: Any) -> bool:
    return isinstance(given, np.ndarray) and given.ndim > 0


def _arrays(given: Any) -> Any:
    """Tensors as arrays; what a tokenizer gave, as the token ids that its mask does not leave out."""
    if not (isinstance(given, Mapping) and {"input_ids", "attention_mask"} <= set(given)):
        return _array(given)
    rows, masks = (_array(given[name]) for name in ("input_ids", "attention_mask"))
    if is_token_ids(rows):
        rows, masks = [rows], [masks]
    try:
        return [np.asarray(row)[np.asarray(mask, bool)] for row, mask in zip(rows, masks, strict=True)]
    except (TypeError, ValueError, IndexError):
        raise UserError("input_ids and attention_mask do not fit one another; give what the tokenizer gave") from None


def _array(given: Any) -> Any:
    return given.detach().cpu().numpy() if hasattr(given, "detach") else given


def tokenized(
    samples: Iterable[Sample], model: OpenModel, wrapping: Wrapping, most: int | None = None
) -> list[TokenizedSample]:
    """UserError where a text has no token, or more than the model takes."""
    samples = list(samples)
    if not samples:
        raise UserError("there are no texts; give at least one")
    allowed = longest_sample(model.config) if most is None else most
    found = list(tokenize(iter(samples), model.tokenizer, allowed, wrapping, InputCounts(), model.config.vocab_size))
    if len(found) < len(samples):
        there = {sample.sample_id for sample in found}
        lacking = next(sample.sample_id for sample in samples if sample.sample_id not in there)
        raise UserError(f"text {lacking!r} has no token; leave it out")
    for sample in found:
        if sample.truncated:
            raise UserError(
                f"text {sample.sample_id!r} has {sample.full_length} tokens and the model takes {allowed}; shorten it"
            )
    return found


def with_answers(
    prompts: Sequence[TokenizedSample], answers: Sequence[Text] | Text, model: OpenModel
) -> tuple[list[TokenizedSample], list[np.ndarray]]:
    """Prompts with an answer behind each, and the token ids of the answers.

    Answers are tokenised by themselves, without special tokens: one that is to begin a word begins with a space.
    """
    each = for_each([answers] if isinstance(answers, str) or is_token_ids(answers) else answers, prompts, "answers")
    plain = Wrapping(add_special_tokens=False, kept=Kept(one_opening=False))
    found = [sample.token_ids for sample in tokenized(_named_answers(each, prompts), model, plain)]
    allowed = longest_sample(model.config)
    samples = []
    for prompt, tokens in zip(prompts, found, strict=True):
        if (length := prompt.length + len(tokens)) > allowed:
            raise UserError(
                f"text {prompt.sample_id!r} has {length} tokens with its answer and the model takes {allowed}; shorten "
                "it"
            )
        both = np.concatenate([prompt.token_ids, tokens])
        meta = {**prompt.meta, PROMPT_TOKENS: prompt.length}
        samples.append(dataclasses.replace(prompt, token_ids=both, full_length=length, meta=meta))
    return samples, found


def _named_answers(answers: Sequence[Text], prompts: Sequence[TokenizedSample]) -> Iterator[Sample]:
    for answer, prompt in zip(answers, prompts, strict=True):
        yield from named_inputs({f"the answer to {prompt.sample_id}": answer})


def capture_plan(capture: Capture, positions: str, model: OpenModel) -> CapturePlan:
    """What is kept; no hook point for None.

    Args:
      capture: hook point -> layers (one or several, as `--layers_to_extract` has them; None where it has no layer, or
        by its TransformerLens name has one), or hook points that need no layers, or "all" of everything.
    """
    if not isinstance(positions, str):
        raise UserError(f"positions of capture are words such as 'last' or 'at:0,5', not {positions!r:.60}")
    blocks = model.config.num_hidden_layers
    found: dict[str, set[int]] = {}
    for name, given in _captured(capture).items():
        for hook, named in resolve_hook_points([name], model.family.hook_points(model.config)).items():
            layers = found.setdefault(hook, set())
            if HOOK_POINTS[hook].per_layer:
                layers |= _layers(hook, given, blocks, named)
            elif given is not None and not is_glob(name):
                raise UserError(f"{hook!r} has no layer; capture it as {{{hook!r}: None}}")
    captures = tuple((hook, tuple(sorted(found[hook]))) for hook in HOOK_POINTS if hook in found)
    for hook, layers in captures:
        layers_there(layers, blocks)
        if HOOK_POINTS[hook].per_layer and not layers:
            raise UserError(f"capture names no layer of {hook!r}; give some, or 'all'")
    return CapturePlan(captures, Positions.parse(positions), "float32")


def _captured(capture: Any) -> Mapping[str, Any]:
    """Hook points, still in the caller's words, with their layers."""
    if capture is None:
        return {}
    if isinstance(capture, str):
        return {"*": _ALL} if capture in (_ALL, "*") else {capture: None}
    names = list(capture) if isinstance(capture, Iterable) else [capture]
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"capture names hook points, as in capture={{'after_block': [12]}}, not {name!r:.60}")
    return capture if isinstance(capture, Mapping) else dict.fromkeys(names)


def _layers(hook: str, given: Any, blocks: int, named: set[int] | None) -> set[int]:
    """Of a hook point whose name named these."""
    if given is None and named:
        return named
    if given is None:
        raise UserError(f"say which layers of {hook!r}, as in capture={{{hook!r}: [{blocks // 2}]}}, or 'all'")
    words = layer_words(given, f"the layer of {hook!r} in capture=") or ()
    layers = set(layers_there(words, blocks))
    if named and layers != named:
        raise UserError(
            f"capture names layer {next(iter(named))} of {hook!r} by its name, and {given!r:.60}; give one of both"
        )
    return layers


def logit_positions(asked: LogitPositions, samples: Sequence[TokenizedSample]) -> list[np.ndarray]:
    """int64 of each sample, from 0; empty for None. UserError where a sample has no such token."""
    if asked is None:
        return [np.zeros(0, np.int64) for _ in samples]
    if isinstance(asked, str):
        if asked not in ("last", "all"):
            raise UserError(f"unknown logits {asked!r}; expected None, 'last', 'all', or positions such as [0, -1]")
        return [np.arange(s.length) if asked == "all" else np.array([s.prompt_length - 1]) for s in samples]
    given: Any = _array(asked)
    several: Any = [given] if isinstance(given, Integral) else given
    whole = isinstance(several, Sequence) or _has_rows(several)
    if not whole or not len(several) or not all(isinstance(position, Integral) for position in several):
        raise UserError(f"logits are asked for at whole numbers, such as [0, -1], not {asked!r:.60}")
    for sample in samples:
        for position in several:
            if not -sample.prompt_length <= position < sample.length:
                raise UserError(
                    f"logits are asked for at position {position}, and sample {sample.sample_id!r} has the positions 0 "
                    f"to {sample.length - 1}"
                )
    return [np.array([p if p >= 0 else s.prompt_length + p for p in several], np.int64) for s in samples]
