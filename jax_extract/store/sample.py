"""What a run hands out: one sample, the rows of one part, and whose the rows of the whole run are.

In: parts, and the sites that somebody asks for. Out: plain values; a sample reads its rows when they are asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.store.documents import Piece, documents_of, pieces_of
from jax_extract.store.file_part import StoredPart
from jax_extract.store.parts import Site
from jax_extract.store.token_text import token_texts
from jax_extract.store.torch_tensors import tensor_of

DEFAULT_HOOK_POINT = "after_block"

SiteOf = Callable[[int | None, str], Site]


def asked(where: int | str | None, hook: int | str | None, layer: int | None) -> tuple[int | None, str]:
    """Layer and hook point of a call such as `get(12)`, `get("ffn_out", layer=12)`, `get(12, "ffn_out")`.

    Raises:
      UserError: two layers or two hook points are named.
    """
    given = [value for value in (where, hook, layer) if value is not None]
    names = [value for value in given if isinstance(value, str)]
    layers = [value for value in given if not isinstance(value, str)]
    for one in layers:
        if isinstance(one, bool) or not hasattr(one, "__index__") or getattr(one, "ndim", 0):
            raise UserError(f"{one!r:.60} is neither a layer nor a hook point; name one, as in get(12, 'ffn_out')")
    if len(names) > 1 or len(layers) > 1:
        raise UserError(
            f"{given[0]!r} and {given[1]!r} are both given; name one layer and one hook point, as in get(12, 'ffn_out')"
        )
    return (operator.index(layers[0]) if layers else None), (names[0] if names else DEFAULT_HOOK_POINT)


@dataclass(frozen=True, repr=False, eq=False)
class SampleActivations:
    """One sample of a run.

    Attributes:
      sample_id: the source's name for it.
      sample_index: its place in the input.
      token_ids: int32 [tokens], all of them, special tokens included.
      positions: int32 [rows], the token position of each stored row; -1 where a row is the mean of all.
      meta: the source's JSON values.
      fields: of these, the other fields of its row, such as an answer or a label; empty where there are none.
      truncated_tokens: how many tokens were cut off its end.
      pieces: the documents that it was joined from, with --context_tokens; else itself.
    """

    sample_id: str
    sample_index: int
    token_ids: np.ndarray
    positions: np.ndarray
    meta: Mapping[str, Any]
    truncated_tokens: int
    _site: SiteOf
    _part: StoredPart
    _rows: tuple[int, int]

    def __repr__(self) -> str:
        return f"SampleActivations({self.sample_id!r}, {len(self.token_ids)} tokens, {len(self.positions)} rows)"

    def tokens(self, tokenizer: Any, positions: Iterable[int] | None = None) -> list[str]:
        """The text of each of its tokens, to be read beside rows or on an axis.

        Spaces and line breaks are kept, so that joined they are the text; bytes that are no whole character are
        written as in Python (`\\xe2`), special tokens by their names.

        Args:
          tokenizer: the model's.
          positions: which tokens, such as `sample.positions` for those of the rows; all where left out. -1, which is
            the position of a mean, gives `mean`.
        """
        if positions is None:
            return token_texts(tokenizer, self.token_ids)
        places = np.array([*positions], np.int64)
        if len(wrong := places[(places < -1) | (places >= len(self.token_ids))]):
            raise UserError(
                f"{self.sample_id!r} has no position {wrong[0]}; its {len(self.token_ids)} tokens have the positions "
                f"0 to {len(self.token_ids) - 1}"
            )
        return token_texts(tokenizer, np.where(places < 0, -1, self.token_ids[places]))

    @property
    def fields(self) -> Mapping[str, Any]:
        return self.meta.get("fields", {})

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return pieces_of(self.sample_id, len(self.token_ids), self.meta)

    @property
    def documents(self) -> np.ndarray:
        """Strings [rows], the document of each row; empty where it is of none, as a BOS between two."""
        return self._documents[0]

    @property
    def document_positions(self) -> np.ndarray:
        """int32 [rows], which token of its document each row is; -1 where it is of none, or a mean."""
        return self._documents[1]

    @property
    def _documents(self) -> tuple[np.ndarray, np.ndarray]:
        return documents_of(self.pieces, self.positions)

    def get(
        self,
        where: int | str | None = None,
        /,
        hook: str | None = None,
        *,
        layer: int | None = None,
        torch: bool = False,
    ) -> Any:
        """Its activations, [positions, width], in the run's stored dtype.

        Args:
          where: a layer, or a hook point by name or TransformerLens name, as in `get(12)` and
            `get("blocks.12.hook_resid_post")`.
          hook, layer: the same by keyword; the hook point is `after_block` where none is named, and the layer can be
            left out where there is only one.
          torch: a `torch.Tensor` that shares the memory of the array, bfloat16 as `torch.bfloat16`.

        Returns:
          A NumPy array; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
          UserError: the run does not hold that layer or hook point, or its bytes are damaged.
        """
        rows = self._part.rows(self._site(*asked(where, hook, layer)), *self._rows)
        return tensor_of(rows) if torch else rows


@dataclass(frozen=True, repr=False, eq=False)
class ActivationBatch:
    """All rows of one part at one site.

    Attributes:
      batch, part: place in the run.
      sample_ids: samples in row order.
      row_offsets: int64 [samples + 1]: sample i has rows row_offsets[i] to row_offsets[i + 1].
      positions: int32 [rows].
      token_ids: int32 [rows], the token at each row's position; -1 where a row is a mean.
      activations: [rows, width]; a tensor where that was asked for.
      sample_indices: int64 [samples], the place of each in the input.
    """

    batch: int
    part: int
    sample_ids: tuple[str, ...]
    row_offsets: np.ndarray
    positions: np.ndarray
    token_ids: np.ndarray
    activations: Any
    sample_indices: np.ndarray

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.activations.shape))
        return (
            f"ActivationBatch(batch {self.batch}, part {self.part}: {len(self.sample_ids)} samples, "
            f"{shape} {self.activations.dtype})"
        )

    def __len__(self) -> int:
        """How many rows."""
        return len(self.positions)

    def tokens(self, tokenizer: Any) -> list[str]:
        """The text of each row's token, as `SampleActivations.tokens` gives it."""
        return token_texts(tokenizer, self.token_ids)


@dataclass(frozen=True, repr=False, eq=False)
class RunRows:
    """Whose the rows of a whole run are, in the order of the input; the rows themselves are `Run.get`'s.

    Attributes:
      sample_ids: samples in row order.
      row_offsets: int64 [samples + 1]: sample i has rows row_offsets[i] to row_offsets[i + 1].
      sample_indices: int64 [rows], the place of each row's sample in the input.
      positions: int32 [rows], the token position of each row; -1 where it is a mean.
      token_ids: int32 [rows], the token at that position; -1 where the row is a mean.
    """

    sample_ids: tuple[str, ...]
    row_offsets: np.ndarray
    sample_indices: np.ndarray
    positions: np.ndarray
    token_ids: np.ndarray

    def __repr__(self) -> str:
        return f"RunRows({len(self.sample_ids)} samples, {len(self)} rows)"

    def __len__(self) -> int:
        return len(self.positions)

    def tokens(self, tokenizer: Any) -> list[str]:
        """The text of each row's token, as `SampleActivations.tokens` gives it."""
        return token_texts(tokenizer, self.token_ids)
