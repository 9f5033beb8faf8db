"""Which token comes next: the likeliest one, or one drawn.

In: logits. Out: token ids. What is drawn for a sample depends on the seed, the sample's place in the input and the
step alone: never on the batch, the mesh or the other samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import jax
import jax.numpy as jnp
from jax import Array

from jax_extract.errors import UserError

_LARGEST_SEED = 2**32 - 1  # more than that a key does not keep
_LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only so many of the likeliest tokens; None for all.
      top_p: only the likeliest tokens that together have this probability (Holtzman et al., "The Curious Case of
        Neural Text Degeneration", 2020, section 3.1); None for all.
      seed: of everything drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """UserError where a value makes no sense, or would be without effect."""
        for name, kind in (("temperature", Real), ("top_k", Integral), ("top_p", Real), ("seed", Integral)):
            value = getattr(self, name)
            is_left_out = value is None and name in ("top_k", "top_p")
            if not is_left_out and (isinstance(value, bool) or not isinstance(value, kind)):
                raise UserError(f"--{name} {value!r:.60} must be a {'whole ' if kind is Integral else ''}number")
        if self.temperature != 0 and not _LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise UserError(
                f"--temperature {self.temperature} must be 0 (the likeliest token) or at least {_LEAST_TEMPERATURE}"
            )
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise UserError(f"--seed {self.seed} must be from 0 to {_LARGEST_SEED} where answers are drawn")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k {self.top_k} must be at least 1; leave it out for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p} must be above 0 and at most 1; leave it out for all tokens")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UserError("--top_k and --top_p choose among tokens that are drawn; add --temperature 1, or another")

    def choose(self, logits: Array, samples: Array, step: Array, seed: Array) -> Array:
        """int32 [b] of logits float32 [b, vocab]; `samples` int32 [b] are places in the input, `step` a scalar.

        The seed is a uint32 scalar beside them, so that one compiled program serves every seed.
        """
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # Below the largest, so that no temperature makes infinity of it.
        logits = logits - jnp.max(logits, axis=-1, keepdims=True)
        logits = self.restricted(logits / jnp.float32(self.temperature))
        keys = jax.vmap(lambda sample: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), step))
        return jax.vmap(jax.random.categorical)(keys(samples), logits).astype(jnp.int32)

    def restricted(self, logits: Array) -> Array:
        """logits [b, vocab] with minus infinity in the place of tokens that are not drawn from; k before p."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            shares = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(shares, axis=-1) - shares  # the likeliest one has none before it, and always stays
            least = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits
