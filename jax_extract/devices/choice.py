"""Which kind of device a command computes on, decided before JAX looks for any.

In: `auto`, `cpu`, `gpu` or `tpu`. Out: JAX with that kind as its default; or one sentence where there is none.
"""

from __future__ import annotations

from typing import Literal

from jax_extract.errors import UserError

DeviceChoice = Literal["auto", "cpu", "gpu", "tpu"]


def use_devices(choice: DeviceChoice) -> None:
    """Has JAX compute there; call it before anything else of JAX is used."""
    import jax

    if choice == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        found = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names one that is not here
        asked = jax.config.values.get("jax_platforms") or "its devices"
        raise UserError(
            f"JAX cannot use {asked} here ({str(error).partition('.')[0][:120]}); unset JAX_PLATFORMS, or compute on "
            "the CPU with --device cpu (USE_CPU=true)"
        ) from None
    kind = "gpu" if found in ("cuda", "rocm", "gpu") else found
    if choice not in ("auto", kind):
        raise UserError(
            f"--device {choice} was asked for and JAX finds only {kind} devices here; install "
            f"jax_extract[{'cuda' if choice == 'gpu' else 'tpu'}] where there is one, or leave it to --device auto"
        )
