"""A trained sparse autoencoder, as it is used: rows in, latents and reconstructions out.

In: a folder that SAELens would load. Out: `SparseAutoencoder`, whose functions are pure and may be compiled,
differentiated and used in an edit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jax_extract.errors import UserError, user_path
from jax_extract.sae import folder as folders
from jax_extract.sae.selection import active, kth_largest_of_rows

_ENCODED_BY = {
    "standard": "relu",
    "transcoder": "relu",
    "jumprelu": "jumprelu",
    "jumprelu_transcoder": "jumprelu",
    "topk": "topk",
    "gated": "gated",
}
_NEEDS = {
    "relu": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
}

Params = Mapping[str, Any]


class Form(NamedTuple):
    """What of cfg.json decides the computation; static where that is compiled.

    Attributes:
      kind: relu, jumprelu, topk or gated.
      centred: whether b_dec is taken from the rows first.
      k: latents of a row, of topk.
      by_norm: whether topk chooses by activations times the norms of the decoder.
    """

    kind: str
    centred: bool = True
    k: int = 0
    by_norm: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Form:
        kind = _ENCODED_BY[config["architecture"]]
        by_norm = kind == "topk" and bool(config.get("rescale_acts_by_decoder_norm"))
        return cls(kind, bool(config.get("apply_b_dec_to_input", True)), int(config.get("k") or 0), by_norm)


def encode(form: Form, params: Params, x: Array) -> Array:
    """float32 [rows, d_sae], the latents of float32 rows [rows, d_in]."""
    if form.centred:
        x = x - params["b_dec"][None]
    z = jnp.matmul(x, params["W_enc"], precision=lax.Precision.HIGHEST)
    if form.kind == "gated":
        magnitude = z * jnp.exp(params["r_mag"])[None] + params["b_mag"][None]
        return jnp.where(z + params["b_gate"][None] > 0, jnp.maximum(magnitude, 0), 0)
    pre = z + params["b_enc"][None]
    if form.kind == "jumprelu":
        return jnp.where(pre > params["threshold"][None], jnp.maximum(pre, 0), 0)
    if form.kind == "topk":
        pre = pre * _norms(params)[None] if form.by_norm else pre
        chosen = active(pre, jnp.ones(pre.shape[1]), kth_largest_of_rows(pre, form.k))
        return jnp.where(chosen, pre, 0)
    return jnp.maximum(pre, 0)


def decode(form: Form, params: Params, latents: Array) -> Array:
    """float32 [rows, d_out], what latents [rows, d_sae] reconstruct."""
    f = latents / _norms(params)[None] if form.by_norm else latents
    return jnp.matmul(f, params["W_dec"], precision=lax.Precision.HIGHEST) + params["b_dec"][None]


def _norms(params: Params) -> Array:
    return jnp.linalg.norm(params["W_dec"], axis=1)


@dataclass(frozen=True, eq=False, repr=False)
class SparseAutoencoder:
    """Attributes:
    config: cfg.json.
    params: float32 arrays by SAELens' names: W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_dec [d_out], and those of its
      architecture.
    """

    config: dict[str, Any]
    params: dict[str, Array]

    @classmethod
    def open(cls, path: str | Path) -> SparseAutoencoder:
        """A folder with cfg.json and sae_weights.safetensors.

        Raises:
          UserError: it is none, it is damaged, or its architecture or its way of scaling rows is not understood.
        """
        folder = user_path(str(path), "an SAE's folder")
        config, tensors = folders.read(folder)
        name = config["architecture"]
        if name not in _ENCODED_BY:
            raise UserError(
                f"{folder} has the architecture {name!r}, which is not understood; those that are: "
                f"{', '.join(_ENCODED_BY)}"
            )
        for field in ("normalize_activations", "reshape_activations"):
            if (value := config.get(field, "none")) not in ("none", None):
                raise UserError(f"{folder} has {field} {value!r}, which is not folded into its weights; fold it in")
        _require_shapes(folder, config, tensors)
        return cls(config, {key: jnp.asarray(value) for key, value in tensors.items()})

    def __repr__(self) -> str:
        return f"SparseAutoencoder({self.config['architecture']}, {self.d_in} to {self.d_sae})"

    @property
    def d_in(self) -> int:
        return self.params["W_enc"].shape[0]

    @property
    def d_out(self) -> int:
        return self.params["W_dec"].shape[1]

    @property
    def d_sae(self) -> int:
        return self.params["W_enc"].shape[1]

    @property
    def metadata(self) -> dict[str, Any]:
        return self.config.get("metadata") or {}

    @property
    def form(self) -> Form:
        return Form.of(self.config)

    def encode(self, rows: Any) -> Array:
        """float32 [rows, d_sae], the latents of rows [rows, d_in], of a crosscoder also [rows, layers, width].

        Raises:
          UserError: they have another width.
        """
        x = jnp.asarray(rows).astype(jnp.float32)
        if math.prod(x.shape[1:]) != self.d_in or not x.shape[1:]:
            raise UserError(
                f"rows of shape {list(x.shape)} are not those of this SAE, which encodes [rows, {self.d_in}]"
            )
        return encode(self.form, self.params, x.reshape(len(x), -1))

    def decode(self, latents: Array) -> Array:
        """float32 [rows, d_out], what latents [rows, d_sae] reconstruct."""
        return decode(self.form, self.params, latents)

    def __call__(self, rows: Any) -> Array:
        return self.decode(self.encode(rows))


def _require_shapes(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    try:
        d_in, d_sae = int(config["d_in"]), int(config["d_sae"])
        d_out = int(config.get("d_out", d_in))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / folders.CONFIG_FILE} lacks d_in or d_sae; write it again") from None
    k = config.get("k")
    if _ENCODED_BY[config["architecture"]] == "topk" and not (isinstance(k, int) and 1 <= k <= d_sae):
        raise UserError(f"{folder / folders.CONFIG_FILE} has k {k!r}; expected a whole number from 1 to {d_sae}")
    expected = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    expected |= dict.fromkeys(_NEEDS[_ENCODED_BY[config["architecture"]]], (d_sae,))
    for name, shape in expected.items():
        found = tensors[name].shape if name in tensors else "nothing"
        if found != shape:
            raise UserError(f"{folder / folders.WEIGHTS_FILE} has {name} of {found}, and cfg.json says {shape}")
