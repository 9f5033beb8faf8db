"""A trained sparse autoencoder, as it is used: rows in, latents and reconstructions out.

In: a folder that SAELens would load. Out: `SparseAutoencoder`, whose functions are pure and may be compiled,
differentiated and used in an edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def encode(self, rows: Any) -> Array:
        """float32 [rows, d_sae], the latents of rows [rows, d_in]."""
        x = jnp.asarray(rows).astype(jnp.float32)
        if x.ndim != 2 or x.shape[1] != self.d_in:  # noqa: PLR2004
            raise UserError(
                f"rows of shape {list(x.shape)} are not those of this SAE, which encodes [rows, {self.d_in}]"
            )
        params, kind = self.params, _ENCODED_BY[self.config["architecture"]]
        if self.config.get("apply_b_dec_to_input", True):
            x = x - params["b_dec"][None]
        z = jnp.matmul(x, params["W_enc"], precision=lax.Precision.HIGHEST)
        if kind == "gated":
            magnitude = z * jnp.exp(params["r_mag"])[None] + params["b_mag"][None]
            return jnp.where(z + params["b_gate"][None] > 0, jnp.maximum(magnitude, 0), 0)
        pre = z + params["b_enc"][None]
        if kind == "jumprelu":
            return jnp.where(pre > params["threshold"][None], jnp.maximum(pre, 0), 0)
        if kind == "topk":
            if self.config.get("rescale_acts_by_decoder_norm"):
                pre = pre * jnp.linalg.norm(params["W_dec"], axis=1)[None]
            chosen = active(pre, jnp.ones(self.d_sae), kth_largest_of_rows(pre, int(self.config["k"])))
            return jnp.where(chosen, pre, 0)
        return jnp.maximum(pre, 0)

    def decode(self, latents: Array) -> Array:
        """float32 [rows, d_out], what latents [rows, d_sae] reconstruct."""
        f = latents
        if self.config.get("rescale_acts_by_decoder_norm"):
            f = f / jnp.linalg.norm(self.params["W_dec"], axis=1)[None]
        out = jnp.matmul(f, self.params["W_dec"], precision=lax.Precision.HIGHEST)
        return out + self.params["b_dec"][None]

    def __call__(self, rows: Any) -> Array:
        return self.decode(self.encode(rows))


def _require_shapes(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    try:
        d_in, d_sae = int(config["d_in"]), int(config["d_sae"])
        d_out = int(config.get("d_out", d_in))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / folders.CONFIG_FILE} lacks d_in or d_sae; write it again") from None
    expected = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    expected |= dict.fromkeys(_NEEDS[_ENCODED_BY[config["architecture"]]], (d_sae,))
    for name, shape in expected.items():
        found = tensors[name].shape if name in tensors else "nothing"
        if found != shape:
            raise UserError(f"{folder / folders.WEIGHTS_FILE} has {name} of {found}, and cfg.json says {shape}")
