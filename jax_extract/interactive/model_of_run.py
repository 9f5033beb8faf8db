"""The model that a run was made with: where it lies, its tokenizer, and the model itself when it is needed.

In: a run, and the place that the user names. Out: `ModelOfRun`; what is not the run's own model is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.tokenize import tokenizer_digest
from jax_extract.progress import LOADING
from jax_extract.store.reader import Run
from jax_extract.store.token_text import token_texts
from jax_extract.terminal import Terminal
from jax_extract.weights.open_model import OpenModel

if TYPE_CHECKING:
    from jax_extract.interactive.model import Model


@dataclass(frozen=True)
class ModelOfRun:
    """Attributes:
    given: what --model_path names; None for where the run says that it lay.
    """

    run: Run
    given: str | None
    terminal: Terminal

    @cached_property
    def path(self) -> str | None:
        """None where it is not on this machine."""
        if self.given is not None:
            return self.given
        path = str(self.run.metadata.get("model_path") or "")
        return path if path and Path(path).exists() else None

    @property
    def not_here(self) -> str:
        return f"the model {self.run.metadata.get('model_path')} is not on this machine"

    @cached_property
    def tokenizer(self) -> Any:
        """None where the model is not on this machine; UserError where it is another one's."""
        if self.path is None:
            return None
        opened = OpenModel.open(self.path, self._revision, self.run.metadata.get("adapter"), needs_port=False)
        if tokenizer_digest(opened.tokenizer) != self.run.metadata["tokenizer_hash"]:
            raise UserError(
                f"the tokenizer of {self.path} is not the one that this run was made with; give the model of the run "
                "as --model_path"
            )
        return opened.tokenizer

    def token_texts(self, token_ids: np.ndarray) -> list[str]:
        """As the model's tokenizer has them; their numbers where that is not on this machine."""
        if self.tokenizer is None:
            _ = self._told_of_numbers
            return [f"[{token}]" for token in token_ids.tolist()]
        return token_texts(self.tokenizer, token_ids)

    @cached_property
    def _told_of_numbers(self) -> None:
        """Said once."""
        self.terminal.line("note", f"{self.not_here}: tokens are shown by their numbers; --model_path names another")

    def load(self, mesh_shape: str | None = None) -> Model:
        """The whole model; UserError where it is another one."""
        from jax_extract.interactive.model import load_model

        meta = self.run.metadata
        self.tokenizer  # noqa: B018 (which sees to it that it is the run's, before weights are read)
        assert self.path is not None, "who calls sees to it"
        with self.terminal.waiting(LOADING):
            model = load_model(self.path, adapter=meta.get("adapter"), revision=self._revision, mesh_shape=mesh_shape)
        shape = model.config.num_hidden_layers, model.config.hidden_size
        if shape != (expected := (meta["num_hidden_layers"], meta["hidden_dim"])):
            raise UserError(
                f"{self.path} has {shape[0]} layers of width {shape[1]} and the model of this run {expected[0]} of "
                f"width {expected[1]}; give the model of the run as --model_path"
            )
        return model

    @property
    def _revision(self) -> str | None:
        """That of the run, for the run's own model."""
        return None if self.given is not None else self.run.metadata.get("model_revision")
