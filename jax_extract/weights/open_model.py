"""A model before a weight of it is read: what it is, and where its tensors lie.

In: `--model_path`, with its revision and adapter. Out: an `OpenModel`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jax_extract.errors import UserError, user_path
from jax_extract.inputs.tokenize import MissingTokenizer
from jax_extract.weights.checkpoint import Checkpoint
from jax_extract.weights.load import Weights
from jax_extract.weights.model_type import name_model_type
from jax_extract.weights.names import with_embedding
from jax_extract.weights.opening import open_checkpoint
from jax_extract.weights.text_part import text_part
from jax_extract.weights.unported import UNPORTED, variant_of
from models.config_fields import TORCH_MEND
from models.errors import NotComputedHere
from models.ports import Family, ModelConfig, Port
from models.registry import PORTS, port_for


@dataclass(frozen=True)
class OpenModel:
    """A model whose configuration is understood and whose weights are not loaded yet.

    Attributes:
      notes: sentences about what its files say that a user would want to know; no errors.
      tokens_of_base: an adapter's own tokenizer is left out, as it was before there was a choice.
    """

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig
    notes: tuple[str, ...] = ()
    tokens_of_base: bool = False

    @classmethod
    def open(
        cls,
        model_path: str | Checkpoint,
        revision: str | None = None,
        adapter: str | None = None,
        needs_port: bool = True,
    ) -> OpenModel:
        """Without `needs_port` a model will do that no port computes, but Hugging Face does.

        Args:
          model_path: as the flag, or a checkpoint that is opened already.
        """
        if not model_path:
            raise UserError("no model was given; pass --model_path with a folder, a hub id or a .gguf file")
        checkpoint = open_checkpoint(model_path, revision) if isinstance(model_path, str) else model_path
        notes = name_model_type(checkpoint.config)
        checkpoint = text_part(checkpoint)
        model = cls._of(checkpoint, adapter, needs_port)
        return replace(model, notes=(*notes, *model.notes))

    @classmethod
    def _of(cls, checkpoint: Checkpoint, adapter: str | None, needs_port: bool) -> OpenModel:
        if needs_port:
            try:
                return cls._ported(checkpoint, adapter)
            except UserError as refusal:
                raise _with_way_out(refusal, checkpoint) from None
        if checkpoint.config.get("model_type") not in PORTS:
            return cls._unported(checkpoint, adapter, UNPORTED, UNPORTED.config(checkpoint.config))
        try:
            model = cls._ported(checkpoint, adapter)
            Weights(model.checkpoint, model.port, model.config, model.config.num_hidden_layers)
        except UserError as refusal:
            return cls._variant(checkpoint, adapter, refusal)
        return model

    @classmethod
    def _ported(cls, checkpoint: Checkpoint, adapter: str | None) -> OpenModel:
        port = port_for(checkpoint.config)
        checkpoint = with_embedding(checkpoint, port)
        if adapter is not None:
            from jax_extract.weights.adapter import open_adapter

            checkpoint = open_adapter(checkpoint, adapter, port)
        config = port.config(checkpoint.config)
        return cls(checkpoint, port, config, port.fields[config.model_type].notes(checkpoint.config))

    @classmethod
    def _variant(cls, checkpoint: Checkpoint, adapter: str | None, refusal: UserError) -> OpenModel:
        """What a port refused, as transformers computes it; the refusal itself where that is no way out."""
        if not _is_of_the_kind(refusal, checkpoint):
            raise refusal
        try:
            family, config = variant_of(port_for(checkpoint.config), checkpoint.config)
        except UserError:
            raise refusal from None
        model = cls._unported(checkpoint, adapter, family, config)
        reason = str(refusal).partition("; ")[0].removesuffix(f" ({TORCH_MEND})")  # what to do about it is done
        return replace(model, notes=(f"{reason}: transformers' own model computes it",))

    @classmethod
    def _unported(cls, checkpoint: Checkpoint, adapter: str | None, family: Family, config: Any) -> OpenModel:
        if adapter is not None:
            from jax_extract.weights.adapter import beside_adapter

            checkpoint = beside_adapter(checkpoint, adapter, config.vocab_size)
        return cls(checkpoint, family, config)

    @property
    def port(self) -> Port:
        """UserError where no port computes this model."""
        if not isinstance(self.family, Port):
            port_for(self.checkpoint.config).config(self.checkpoint.config)
            raise UserError(f"no port computes {self.checkpoint.source}; see the notes on it")
        return self.family

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's; where that has none, what says so as soon as a text is to be tokenized."""
        read = self.checkpoint.tokenizer
        if self.tokens_of_base:
            read = getattr(self.checkpoint, "tokenizer_of_base", read)
        try:
            return read()
        except UserError as error:
            return MissingTokenizer(str(error))

    @property
    def tokenizer_notes(self) -> tuple[str, ...]:
        """What a user should know of it: where it is an adapter's own."""
        if self.checkpoint.adapter is None or self.tokens_of_base:
            return ()
        _ = self.tokenizer  # which finds out
        return getattr(self.checkpoint, "tokenizer_notes", ())

    @property
    def name(self) -> str:
        """The hub id where there is one, else the name of the folder or file."""
        named = str(self.checkpoint.config.get("_name_or_path") or "")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", named):
            return named
        source = self.checkpoint.source
        path = user_path(source, "--model_path")
        return (path.stem if path.suffix == ".gguf" else path.resolve().name) if path.exists() else source


def _is_of_the_kind(refusal: UserError, checkpoint: Checkpoint) -> bool:
    """Whether it is of what no port computes; else weights are incomplete, or there is no such adapter, and so on."""
    try:
        port_for(checkpoint.config).config(checkpoint.config)
    except UserError:
        return True
    return isinstance(refusal, NotComputedHere)


def _with_way_out(refusal: UserError, checkpoint: Checkpoint) -> UserError:
    """The refusal of a port; with what computes the model instead, where transformers reads its configuration."""
    if TORCH_MEND in str(refusal) or not _is_of_the_kind(refusal, checkpoint):
        return refusal
    try:
        UNPORTED.config(checkpoint.config)
    except UserError:
        return refusal
    return type(refusal)(f"{refusal}; {TORCH_MEND}")
