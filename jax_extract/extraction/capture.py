"""What is captured of a model: layers, hook points and positions in the user's words, checked against it.

In: an `OpenModel` and the words. Out: a capture plan, and its sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jax_extract.errors import UserError
from jax_extract.layer_words import LayerWord, layers_of, layers_there
from jax_extract.store.parts import Site
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import PATTERN_TOKENS, CapturePlan
from models.hooks import HOOK_POINTS, PATTERN, resolve_hook_points
from models.ports import ModelConfig, hook_width, longest_sample
from models.positions import Positions
from models.qwen2_jax_with_hooks import DEFAULT_SAE_LAYERS

LONGEST_DEFAULT = 8_192


def choose_layers(wanted: Iterable[LayerWord] | None, num_layers: int) -> tuple[int, ...]:
    """The layers to capture: the wanted ones, or 10 to 23 as far as the model has them, else all.

    A list equal to the default counts as the default, so the documented command serves every model.
    """
    if wanted is None or layers_of(wanted := tuple(wanted), num_layers) == tuple(DEFAULT_SAE_LAYERS):
        have = tuple(layer for layer in DEFAULT_SAE_LAYERS if layer < num_layers)
        return have or tuple(range(num_layers))
    return layers_there(wanted, num_layers)


def capture_plan(
    model: OpenModel,
    layers: Iterable[LayerWord] | None,
    hook_points: Iterable[str],
    positions: str,
    capture_dtype: str,
    attention_pattern_tokens: int = PATTERN_TOKENS,
) -> CapturePlan:
    """What is captured, checked against the architecture."""
    num_layers = model.config.num_hidden_layers
    chosen = choose_layers(layers, num_layers)
    captures: list[tuple[str, tuple[int, ...]]] = []
    for hook, named in resolve_hook_points(hook_points, model.family.hook_points(model.config)).items():
        if not HOOK_POINTS[hook].per_layer:
            captures.append((hook, ()))
        else:
            captures.append((hook, chosen if named is None else choose_layers(named, num_layers)))
    plan = CapturePlan(tuple(captures), Positions.parse(positions), capture_dtype, attention_pattern_tokens)
    if attention_pattern_tokens != PATTERN_TOKENS and not captures_patterns(plan):
        raise UserError(
            f"--attention_pattern_tokens {attention_pattern_tokens} is about {PATTERN}, which is not asked for; add it "
            "to --hook_points by its name, or leave the option out"
        )
    return plan


def sites_of(plan: CapturePlan, config: ModelConfig) -> list[Site]:
    """Every captured tensor with its width, in file order."""
    return [Site(hook, layer, hook_width(config, hook, plan.pattern_tokens)) for hook, layer in plan.sites()]


def captures_patterns(plan: CapturePlan) -> bool:
    return any(hook == PATTERN for hook, _ in plan.layers)


def require_short_enough(
    plan: CapturePlan, sample_ids: Sequence[str], lengths: np.ndarray, answer: int = 0, mend: str | None = None
) -> None:
    """UserError where `attention_pattern` is captured and a sample has more tokens than a row of it has weights for.

    Args:
      lengths: int [samples], in tokens.
      answer: tokens that may follow each of them yet.
      mend: what can be done; by default by options.
    """
    most = plan.pattern_tokens - answer
    if not captures_patterns(plan) or not (lengths > most).any():
        return
    place = int(np.argmax(lengths > most))
    behind = f" before an answer of up to {answer}" if answer else ""
    if mend is None:
        mend = (
            f"give --attention_pattern_tokens {int(lengths.max()) + answer}, or cut samples with --max_seq_length "
            f"{plan.pattern_tokens}"
        )
    raise UserError(
        f"sample {sample_ids[place]!r} has {lengths[place]} tokens{behind}, and {PATTERN} is kept of samples of at "
        f"most {plan.pattern_tokens}; {mend}"
    )


def sequence_limit(wanted: int | None, config: ModelConfig) -> int:
    """Longest sample in tokens; one who asks for it gets what a scaling of the rotations makes of the positions."""
    allowed = longest_sample(config)
    if wanted is not None and wanted > allowed:
        raise UserError(
            f"--max_seq_length {wanted} is more than the {allowed} positions this model allows; give at most {allowed}"
        )
    return wanted or min(LONGEST_DEFAULT, config.max_position_embeddings)
