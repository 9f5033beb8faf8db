"""The loss of a batch and its gradient, written out: five products of matrices for an autoencoder, where automatic
differentiation computes activations twice and differentiates norms that cancel.

In: an architecture, parameters, rows to encode and rows to reconstruct, knobs. Out: `Step`. The losses are those of
SAELens 6.54 (docs/sae.md): each is a mean over rows. Dimension letters: b rows, d width of what is encoded, o width of
what is reconstructed, f latents, m latents that are looked at because they may be dead.

Of a TopK or BatchTopK SAE, SAELens scales pre-activations by the norm of the decoder before choosing and divides by
it before decoding; both cancel, in the value and in the gradient, so that the norms decide what is chosen and nothing
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_extract.sae.architecture import Architecture
from jax_extract.sae.parameters import norms_by_layer
from jax_extract.sae.selection import active, counted, kth_largest_of_all, kth_largest_of_rows, smallest_chosen

Params = Mapping[str, Array]
_TINY = 1e-20


class Knobs(NamedTuple):
    """Numbers that may differ between SAEs of one compiled step, and between steps.

    Attributes:
      k: float32 [], mean number of latents of a row that are active, where that is chosen over the batch.
      sparsity: float32 [], factor of the sparsity loss (L1 of standard and gated, L0 of JumpReLU).
    """

    k: Array
    sparsity: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """Attributes:
    gradients: by parameter.
    losses: float32 [] by name; their sum is what is minimised.
    fired: int32 [f], rows in which each latent is active.
    chosen: float32 [], the smallest activation that was chosen (scaled by the decoder's norm); infinity where none is.
    error: float32 [], mean squared distance of a row from its reconstruction.
    """

    gradients: dict[str, Array]
    losses: dict[str, Array]
    fired: Array
    chosen: Array
    error: Array

    @property
    def loss(self) -> Array:
        return sum(self.losses.values(), jnp.float32(0))


def step_of(
    architecture: Architecture, params: Params, x: Array, y: Array, knobs: Knobs, dead: Array, guess: Array
) -> Step:
    """Of one batch.

    Args:
      x: float32 [b, d], what is encoded.
      y: float32 [b, o], what is reconstructed; `x` of an autoencoder.
      dead: bool [f], latents that have not fired for long.
      guess: float32 [], what `chosen` was in the step before.
    """
    by_layer = norms_by_layer(params["W_dec"], architecture.layers, jnp)
    shift = jnp.zeros(architecture.d_sae, jnp.float32)
    if architecture.centred:
        shift = _product("d,df->f", params["b_dec"], params["W_enc"])
    encoded = _product("bd,df->bf", x, params["W_enc"])
    batch = _Batch(architecture, params, x, y, encoded, shift, by_layer, jnp.sum(by_layer, axis=1), knobs, dead)
    if architecture.name == "standard":
        return batch.standard()
    if architecture.name == "gated":
        return batch.gated()
    if architecture.name == "jumprelu":
        return batch.jumprelu()
    return batch.of_largest(guess)


@dataclass(frozen=True)
class _Batch:
    """Attributes:
    encoded: float32 [b, f], rows times W_enc.
    shift: float32 [f], the decoder's bias times W_enc, which is to be taken from that.
    norms_by_layer: float32 [f, layers], of the decoder's parts; norms: float32 [f], their sums.
    """

    architecture: Architecture
    params: Params
    x: Array
    y: Array
    encoded: Array
    shift: Array
    norms_by_layer: Array
    norms: Array
    knobs: Knobs
    dead: Array

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    def pre_activations(self) -> Array:
        """float32 [b, f], written once."""
        return lax.optimization_barrier(self.encoded + (self.params["b_enc"] - self.shift)[None])

    def standard(self) -> Step:
        """L = mean |y - ŷ|² + λ mean Σ f_i |W_dec,i|, f = relu(pre-activations)."""
        pre = self.encoded + (self.params["b_enc"] - self.shift)[None]
        f = lax.optimization_barrier(jnp.maximum(pre, 0))
        error, mse = self._error(f)
        per_row = self.knobs.sparsity / self.rows
        sums = jnp.sum(f, axis=0)
        l1 = per_row * jnp.sum(sums * self.norms)
        df = _product("bo,fo->bf", error, self.params["W_dec"]) + per_row * self.norms[None]
        dh = lax.optimization_barrier(jnp.where(f > 0, df, 0))
        decoder = _product("bf,bo->fo", f, error) + self._of_norms(per_row * sums)
        gradients = {**self._shared(dh, decoder, error), "b_enc": jnp.sum(dh, axis=0)}
        return self._step(gradients, {"mse_loss": mse, "l1_loss": l1}, f > 0, mse)

    def gated(self) -> Step:
        """Rajamanoharan et al. 2024 (2404.16014): a gate that decides, a magnitude, and a loss of the gate's own.

        L = mean |y - ŷ|² + λ mean Σ relu(π)_i |W_dec,i| + mean |y - ŷ(relu(π))|². The last term reaches the decoder, as
        in SAELens.
        """
        params = self.params
        rescale = jnp.exp(params["r_mag"])
        z = lax.optimization_barrier(self.encoded - self.shift[None])
        gate = z + params["b_gate"][None]
        magnitude = z * rescale[None] + params["b_mag"][None]
        opened = gate > 0
        f, q = lax.optimization_barrier((jnp.where(opened, jnp.maximum(magnitude, 0), 0), jnp.maximum(gate, 0)))
        error, mse = self._error(f)
        of_gate, aux = self._error(q)
        per_row = self.knobs.sparsity / self.rows
        sums = jnp.sum(q, axis=0)
        l1 = per_row * jnp.sum(sums * self.norms)
        df = _product("bo,fo->bf", error, params["W_dec"])
        dq = _product("bo,fo->bf", of_gate, params["W_dec"]) + per_row * self.norms[None]
        d_magnitude = jnp.where(f > 0, df, 0)
        d_gate = jnp.where(opened, dq, 0)
        dz = lax.optimization_barrier(d_magnitude * rescale[None] + d_gate)
        decoder = _product("bf,bo->fo", f, error) + _product("bf,bo->fo", q, of_gate) + self._of_norms(per_row * sums)
        gradients = {
            **self._shared(dz, decoder, error + of_gate),
            "b_gate": jnp.sum(d_gate, axis=0),
            "b_mag": jnp.sum(d_magnitude, axis=0),
            "r_mag": jnp.sum(d_magnitude * z, axis=0) * rescale,
        }
        losses = {"mse_loss": mse, "l1_loss": l1, "auxiliary_reconstruction_loss": aux}
        return self._step(gradients, losses, f > 0, mse)

    def jumprelu(self) -> Step:
        """Rajamanoharan et al. 2024 (2407.14435): f = h where it is above a learned threshold, and 0 elsewhere.

        Thresholds learn by a straight-through estimator: a rectangle of `bandwidth` about each.
        """
        a, params = self.architecture, self.params
        threshold = params["threshold"][None]
        pre = self.pre_activations()
        on = pre > threshold
        f = lax.optimization_barrier(jnp.where(on, pre, 0))
        error, mse = self._error(f)
        per_row = self.knobs.sparsity / self.rows
        df = _product("bo,fo->bf", error, params["W_dec"])
        decoder = _product("bf,bo->fo", f, error)
        near = (jnp.abs(pre - threshold) < a.bandwidth / 2).astype(jnp.float32)
        if a.sparsity_loss == "tanh":
            bent = jnp.tanh(a.tanh_scale * f * self.norms[None])
            sparsity = per_row * jnp.sum(bent)
            slope = per_row * a.tanh_scale * (1 - jnp.square(bent))
            df = df + slope * self.norms[None]
            decoder = decoder + self._of_norms(jnp.sum(slope * f, axis=0))
            jump = near * df * (threshold / a.bandwidth)
        else:
            sparsity = per_row * jnp.sum(on.astype(jnp.float32))
            jump = near * (df * (threshold / a.bandwidth) + per_row / a.bandwidth)
        dh = jnp.where(on, df, 0)
        dh = dh + jump if a.ste_to_input else dh
        d_threshold = -jnp.sum(jump, axis=0)
        losses = {"mse_loss": mse, "l0_loss": sparsity}
        if a.pre_act_coefficient:
            below = jnp.where(self.dead[None], threshold - pre, 0)
            weight = jnp.where(below > 0, (self.norms * (a.pre_act_coefficient / self.rows))[None], 0)
            losses["pre_act_loss"] = jnp.sum(weight * below)
            dh = dh - weight
            d_threshold = d_threshold + jnp.sum(weight, axis=0)
            share = jnp.sum(jnp.maximum(below, 0), axis=0) * (a.pre_act_coefficient / self.rows)
            decoder = decoder + self._of_norms(share)
        dh = lax.optimization_barrier(dh)
        gradients = {**self._shared(dh, decoder, error), "b_enc": jnp.sum(dh, axis=0), "threshold": d_threshold}
        return self._step(gradients, losses, on, mse)

    def of_largest(self, guess: Array) -> Step:
        """TopK (Gao et al. 2024), BatchTopK (Bussmann et al. 2024, 2412.06410) and its Matryoshka (2503.17547)."""
        a, params = self.architecture, self.params
        pre = self.pre_activations()
        if a.name == "topk":
            assert a.k is not None
            threshold = kth_largest_of_rows(pre * self.norms[None], a.k)
        else:
            count = jnp.floor(self.knobs.k * self.rows).astype(jnp.int32)
            threshold = kth_largest_of_all(pre, self.norms, count, guess)
        f = lax.optimization_barrier(jnp.where(active(pre, self.norms, threshold), pre, 0))
        on = f > 0
        chosen = smallest_chosen(f, self.norms, on)
        if a.widths:
            error, residual, losses, df, decoder = self._nested(f)
            mse = losses["mse_loss"]
        else:
            error, mse = self._error(f)
            residual, losses = error * (-self.rows / 2), {"mse_loss": mse}
            df = _product("bo,fo->bf", error, params["W_dec"])
            decoder = _product("bf,bo->fo", f, error)
        dh = jnp.where(on, df, 0)
        if a.has_aux:
            aux, dh, decoder = self._aux(pre, residual, dh, decoder)
            losses["auxiliary_reconstruction_loss"] = aux
        dh = lax.optimization_barrier(dh)
        gradients = {**self._shared(dh, decoder, error), "b_enc": jnp.sum(dh, axis=0)}
        return self._step(gradients, losses, on, mse, chosen)

    def _nested(self, f: Array) -> tuple[Array, Array, dict[str, Array], Array, Array]:
        """Matryoshka: every prefix of the latents reconstructs on its own, and all their errors are minimised.

        Each latent is decoded once and its gradient is a product with the sum of the errors of the prefixes that have
        it, so that this costs no more than one dictionary.

        Returns:
          The sum of those gradients and what the whole leaves of the rows, [b, o]; losses; gradients by f and W_dec.
        """
        bounds = list(zip((0, *self.architecture.widths), self.architecture.widths, strict=False))
        so_far = self.params["b_dec"][None] - self.y
        errors, losses = [], {}
        for start, stop in bounds:
            so_far = so_far + _product("bf,fo->bo", f[:, start:stop], self.params["W_dec"][start:stop])
            name = "mse_loss" if stop == self.architecture.d_sae else f"inner_mse_loss_{stop}"
            losses[name] = jnp.sum(jnp.square(so_far)) / self.rows
            errors.append(so_far)
        total = jnp.zeros_like(so_far)
        df, decoder = [], []
        for (start, stop), error in zip(reversed(bounds), reversed(errors), strict=True):
            total = lax.optimization_barrier(total + error * (2 / self.rows))
            df.append(_product("bo,fo->bf", total, self.params["W_dec"][start:stop]))
            decoder.append(_product("bf,bo->fo", f[:, start:stop], total))
        return total, -so_far, losses, jnp.concatenate(df[::-1], axis=1), jnp.concatenate(decoder[::-1])

    def _aux(self, pre: Array, residual: Array, dh: Array, decoder: Array) -> tuple[Array, Array, Array]:
        """Dead latents reconstruct what is left of a row: the `aux_k` largest of them (Gao et al., A.2), no bias.

        Only the dead ones are looked at, as many as a power of four of them may be; where none is dead, nothing is.
        """
        a = self.architecture
        count = jnp.sum(self.dead.astype(jnp.int32))
        share = a.aux_coefficient * jnp.minimum(count.astype(jnp.float32) / a.aux_k, 1.0)
        sizes = [0, *dict.fromkeys(max(1, a.d_sae >> shift) for shift in (6, 4, 2, 0))]

        def of(size: int) -> tuple[Array, Array, Array]:
            if not size:
                return jnp.float32(0), dh, decoder
            [at] = jnp.nonzero(self.dead, size=size, fill_value=0)
            is_dead = jnp.arange(size) < count
            values, order = pre[:, at], jnp.where(is_dead[None], pre[:, at] * self.norms[at][None], -jnp.inf)
            if size > a.aux_k:
                wanted = (order >= kth_largest_of_rows(order, a.aux_k)) & is_dead[None]
            else:
                wanted = jnp.broadcast_to(is_dead[None], order.shape)
            g = lax.optimization_barrier(jnp.where(wanted, values, 0))
            rows = self.params["W_dec"][at]
            wrong = _product("bm,mo->bo", g, rows) - residual
            loss = share * jnp.sum(jnp.square(wrong)) / self.rows
            gradient = wrong * (2 * share / self.rows)
            dg = jnp.where(wanted, _product("bo,mo->bm", gradient, rows), 0)
            return loss, dh.at[:, at].add(dg), decoder.at[at].add(_product("bm,bo->mo", g, gradient))

        which = jnp.sum((count > jnp.array(sizes[:-1])).astype(jnp.int32))
        return lax.switch(which, [lambda size=size: of(size) for size in sizes])

    def _error(self, f: Array) -> tuple[Array, Array]:
        """[b, o], the gradient of the mean squared distance by the reconstruction; and that distance."""
        wrong = _product("bf,fo->bo", f, self.params["W_dec"]) + self.params["b_dec"][None] - self.y
        return lax.optimization_barrier(wrong * (2 / self.rows)), jnp.sum(jnp.square(wrong)) / self.rows

    def _shared(self, dz: Array, decoder: Array, error: Array) -> dict[str, Array]:
        """The gradients by what every architecture has.

        Args:
          dz: [b, f], by what the encoder makes of the rows.
          decoder: [f, o], by W_dec.
          error: [b, o], by the reconstruction.
        """
        encoder, bias = _product("bd,bf->df", self.x, dz), jnp.sum(error, axis=0)
        if self.architecture.centred:
            sums = jnp.sum(dz, axis=0)
            encoder = encoder - jnp.outer(self.params["b_dec"], sums)
            bias = bias - _product("df,f->d", self.params["W_enc"], sums)
        return {"W_enc": encoder, "W_dec": decoder, "b_dec": bias}

    def _of_norms(self, gradient: Array) -> Array:
        """The gradient by W_dec [f, o] of what has the gradient [f] by its norms."""
        decoder, norms = self.params["W_dec"], jnp.maximum(self.norms_by_layer, _TINY)
        parts = decoder.reshape(*norms.shape, -1) * (gradient[:, None] / norms)[:, :, None]
        return parts.reshape(decoder.shape)

    def _step(
        self, gradients: dict[str, Array], losses: dict[str, Array], on: Array, mse: Array, chosen: Array | None = None
    ) -> Step:
        return Step(gradients, losses, counted(on), jnp.float32(jnp.inf) if chosen is None else chosen, mse)


def _product(dimensions: str, a: Array, b: Array) -> Array:
    """float32 wherever it is computed."""
    return jnp.einsum(dimensions, a, b, precision=lax.Precision.HIGHEST)
