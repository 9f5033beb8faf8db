"""Which stored tensor is which parameter's, and which are nobody's.

In: a `Checkpoint`, a port, its configuration. Out: `StoredNames`; UserError for a tensor that is missing, misshapen or
not understood, the last as `NotComputedHere`.

transformers loads what it has a place for and warns of the rest. Here the rest is told apart, for a bias that is
dropped in silence gives wrong rows:

- buffers that nobody reads are passed over in silence, whatever their dtype: causal masks, rotary tables,
  position ids, a second copy of a head that is the embedding, a head that is not asked for, a bias of zeros;
- what lies outside the decoder (heads of other tasks, value heads, further predictors, towers that see or hear) and
  blocks beyond those of config.json are passed over, and told in a note: transformers ignores them as well;
- any other tensor of the decoder is refused by name: this is another architecture, or a modified one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.weights.checkpoint import Checkpoint
from jax_extract.weights.renamed import RenamedCheckpoint
from models.errors import NotComputedHere
from models.ports import Port

# Buffers of every age of transformers, and what other trainers leave beside a module.
_BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.\w+|inv_freq|position_ids|masked_bias|causal_mask|cos_cached|sin_cached|_extra_state)"
)
# Modules within the base model that its stream of text does not go through.
_OTHER_PARTS = re.compile(r"mtp|vision|visual|image|audio|speech|multi_modal|mm_projector")
# transformers 5 calls GPT-NeoX's head as it does everyone's.
_HEADS = ("lm_head.weight", "embed_out.weight")
# What wrappers of a model put before every name; transformers finds nothing under them either.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.")
_MERGE = "merge the adapter with PEFT (merge_and_unload) and save the model"
_FEW = 3  # names in a sentence


@dataclass(frozen=True)
class StoredNames:
    """Attributes:
    names: a tensor's name in the port -> its name in the files.
    notes: to the user, about tensors that are passed over.
    """

    names: dict[str, str]
    notes: tuple[str, ...]


def stored_names(
    checkpoint: Checkpoint, port: Port, config: Any, expected: dict[str, tuple[int, ...]], with_head: bool
) -> StoredNames:
    """Finds every tensor of the port.

    Args:
      expected: name -> shape of each tensor that the model consists of.
      with_head: whether the language-model head is computed.
    """
    stored = checkpoint.names()
    names: dict[str, str] = {}
    known: set[str] = set()
    for name, shape in expected.items():
        candidates = tuple(_candidates(name, port))
        known.update(candidates)
        found = next((candidate for candidate in candidates if candidate in stored), None)
        if found is None:
            raise UserError(_missing(_whole(name, port, stored), checkpoint))
        if (there := checkpoint.shape(found)) != shape:
            raise UserError(
                f"{found!r} in {checkpoint.source} has shape {there} where config.json means {shape}; "
                "weights and configuration do not belong together"
            )
        names[name] = found
    unused = {name for source in port.sources(config).values() for name in source.names} | port.unused_tensors(config)
    known.update(candidate for name in unused if "{i}" not in name for candidate in _candidates(name, port))
    if with_head:
        _require_same_head(checkpoint, port, config)
    return StoredNames(names, _notes(checkpoint, port, config, stored - known, with_head))


def with_embedding(checkpoint: Checkpoint, port: Port) -> Checkpoint:
    """Where a tensor that is embedding and head was saved as the head alone, the same with the embedding."""
    config = port.config(checkpoint.config)
    stored = checkpoint.names()
    embedding = port.sources(config)["embedding"].names[0]
    if not config.tie_word_embeddings or not stored.isdisjoint(_candidates(embedding, port)):
        return checkpoint
    heads = [head for head in _HEADS if head in stored]
    return RenamedCheckpoint(checkpoint, {**{n: n for n in stored}, embedding: heads[0]}) if heads else checkpoint


def _candidates(name: str, port: Port) -> Iterator[str]:
    """The names under which a tensor may be stored, the usual one first."""
    yield name
    if port.prefix and name.startswith(port.prefix):
        yield name.removeprefix(port.prefix)
    if name in _HEADS:
        yield from (head for head in _HEADS if head != name)


def _whole(name: str, port: Port, stored: Iterable[str]) -> str:
    """As this file would call it."""
    return name if any(other.startswith(port.prefix) for other in stored) else name.removeprefix(port.prefix)


def _missing(name: str, checkpoint: Checkpoint) -> str:
    for wrapper in _WRAPPERS:
        if any(other.startswith(wrapper) for other in checkpoint.names()):
            return (
                f"the weights of {checkpoint.source} have names that begin with {wrapper!r}, as a wrapper of the model "
                "saves them; save the model within it with save_pretrained"
            )
    if any(".base_layer." in other for other in checkpoint.names()):
        return f"the weights of {checkpoint.source} hold an adapter that is not merged; {_MERGE}"
    known = f" ({'; '.join(checkpoint.notes)})" if checkpoint.notes else ""
    return f"the weights of {checkpoint.source} lack {name!r}; the checkpoint is incomplete{known}"


def _require_same_head(checkpoint: Checkpoint, port: Port, config: Any) -> None:
    """UserError where a head is stored that should be the embedding and is not: transformers would compute with it."""
    if not config.tie_word_embeddings:
        return
    stored = checkpoint.names()
    embedding = next(name for name in _candidates(port.sources(config)["embedding"].names[0], port) if name in stored)
    for head in _HEADS:
        if head in stored and not _are_equal(checkpoint, embedding, head):
            raise UserError(
                f"{head!r} in {checkpoint.source} is not {embedding!r}, though config.json ties them; set "
                "tie_word_embeddings to false there, which is how transformers loads it"
            )


def _are_equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.shape(one) != checkpoint.shape(other):
        return False
    rows, step = checkpoint.shape(one)[0], 4096
    parts = (slice(start, start + step) for start in range(0, rows, step))
    return all(np.array_equal(checkpoint.read(one, part), checkpoint.read(other, part)) for part in parts)


def _notes(checkpoint: Checkpoint, port: Port, config: Any, unknown: Iterable[str], with_head: bool) -> tuple[str, ...]:
    """About tensors that no parameter is made of; UserError where one of them may matter."""
    roots, blocks = _layout(port, config)
    outside: list[str] = []
    beyond: list[str] = []
    refused: list[str] = []
    prefixed = any(name.startswith(port.prefix) for name in checkpoint.names())
    for name in sorted(unknown):
        own = name.removeprefix(port.prefix)
        block = re.match(rf"{re.escape(blocks)}(\d+)\.", own)
        is_inside = (prefixed and name.startswith(port.prefix)) or own.partition(".")[0] in roots
        if _BUFFERS.fullmatch(name):
            continue
        if block and int(block[1]) >= config.num_hidden_layers:
            beyond.append(name)
        elif own.startswith(tuple(f"{head.removesuffix('weight')}" for head in _HEADS)):
            refused += [name] if with_head and not _is_zero(checkpoint, name) else []
        elif not is_inside or _OTHER_PARTS.match(own):
            outside.append(name)
        elif not _is_zero(checkpoint, name):
            refused.append(name)
    if refused:
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        mend = _MERGE if "lora_" in refused[0] else "this is another architecture or a modified one"
        raise NotComputedHere(
            f"the weights of {checkpoint.source} hold {refused[0]!r}{more}, which the {config.model_type} port does "
            f"not compute with; {mend}"
        )
    notes = []
    if beyond:
        notes.append(
            f"the weights hold blocks from {config.num_hidden_layers} on ({_some(beyond)}), which config.json does not "
            "have; they are not read"
        )
    if outside:
        notes.append(f"the weights hold tensors outside the decoder ({_some(outside)}), which are not read")
    return tuple(notes)


def _layout(port: Port, config: Any) -> tuple[frozenset[str], str]:
    """(modules at the top of the base model, how the names of its blocks begin), without the prefix."""
    names = [name for source in port.sources(config).values() for name in source.names]
    own = [name.removeprefix(port.prefix) for name in names if name.startswith(port.prefix)]
    blocks = next(name.partition("{i}")[0] for name in own if "{i}" in name)
    return frozenset(name.partition(".")[0] for name in own), blocks


def _is_zero(checkpoint: Checkpoint, name: str) -> bool:
    """Whether it is a bias that adds nothing."""
    try:
        return name.endswith(".bias") and not np.any(checkpoint.read(name))
    except UserError:  # of a dtype that is not understood
        return False


def _some(names: list[str]) -> str:
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")
