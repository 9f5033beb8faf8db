"""A model before a weight of it is read: what it is, and where its tensors lie.

In: `--model_path`, with its revision and adapter. Out: an `OpenModel`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax_extract.errors import UserError, user_path
from jax_extract.inputs.tokenize import MissingTokenizer
from jax_extract.weights.checkpoint import Checkpoint, open_checkpoint
from jax_extract.weights.text_part import text_part
from jax_extract.weights.unported import UNPORTED
from models.ports import Family, ModelConfig, Port
from models.registry import PORTS, port_for


@dataclass(frozen=True)
class OpenModel:
    """A model whose configuration is understood and whose weights are not loaded yet."""

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig

    @classmethod
    def open(
        cls, model_path: str, revision: str | None = None, adapter: str | None = None, needs_port: bool = True
    ) -> OpenModel:
        """Without `needs_port` an architecture will do that no port computes, but Hugging Face does."""
        if not model_path:
            raise UserError("no model was given; pass --model_path with a folder, a hub id or a .gguf file")
        checkpoint = text_part(open_checkpoint(model_path, revision))
        if not needs_port and checkpoint.config.get("model_type") not in PORTS:
            if adapter is not None:
                raise UserError(
                    f"--adapter {adapter!r} cannot be merged into a {checkpoint.config.get('model_type')!r} model "
                    "here; merge it with PEFT (merge_and_unload) and give the saved model as --model_path"
                )
            return cls(checkpoint, UNPORTED, UNPORTED.config(checkpoint.config))
        try:
            port = port_for(checkpoint.config)
        except UserError as error:
            raise UserError(f"{error}; --backend torch computes others that transformers has") from None
        if adapter is not None:
            from jax_extract.weights.adapter import open_adapter

            checkpoint = open_adapter(checkpoint, adapter, port)
        return cls(checkpoint, port, port.config(checkpoint.config))

    @property
    def port(self) -> Port:
        """UserError where no port computes this architecture."""
        if not isinstance(self.family, Port):
            port_for(self.checkpoint.config)
        assert isinstance(self.family, Port)
        return self.family

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's; where that has none, what says so as soon as a text is to be tokenized."""
        try:
            return self.checkpoint.tokenizer()
        except UserError as error:
            return MissingTokenizer(str(error))

    @property
    def tokenizer_notes(self) -> tuple[str, ...]:
        """What a user should know of it: where it is an adapter's own."""
        if self.checkpoint.adapter is None:
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
