"""What a sparse autoencoder is, before it has weights: its architecture, its widths, and what decides its training.

In: choices of a user. Out: `Architecture`, static and hashable, of which a compiled step is a function; and `Knobs`,
the numbers that may differ between SAEs of one compiled step. Names are those of SAELens, whose losses these are
(docs/sae.md has the formulas and where they come from).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from jax_extract.errors import UserError
from models.nearest import nearest

Name = Literal["standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka_batchtopk"]
NAMES: tuple[str, ...] = get_args(Name)
_ALSO = {"relu": "standard", "l1": "standard", "matryoshka": "matryoshka_batchtopk"}
WITH_L1 = ("standard", "gated")
WITH_K = ("topk", "batchtopk", "matryoshka_batchtopk")
OVER_BATCH = ("batchtopk", "matryoshka_batchtopk")
SparsityLoss = Literal["step", "tanh"]
ANTHROPIC: dict[str, Any] = {  # JumpReLU as of the circuits update of January 2025
    "sparsity_loss": "tanh",
    "bandwidth": 2.0,
    "ste_to_input": True,
    "pre_act_coefficient": 3e-6,
}


@dataclass(frozen=True)
class Architecture:
    """Attributes:
    name: one of `NAMES`.
    d_in: width of what is encoded.
    d_out: width of what is reconstructed: `d_in` of an autoencoder, that of another hook point of a transcoder.
    d_sae: latents.
    k: latents of a row that are active (topk); of the others a knob, because nothing compiled depends on it.
    widths: of the nested dictionaries of a Matryoshka SAE, ascending, the last one `d_sae`.
    sparsity_loss: of a JumpReLU SAE: `step` is the L0 of Rajamanoharan et al. 2024 (2407.14435), `tanh` that of
      Anthropic (January 2025).
    bandwidth: of the straight-through estimator of a JumpReLU SAE.
    tanh_scale: of `tanh`.
    ste_to_input: whether that estimator reaches the pre-activations too (Anthropic) or the thresholds alone (DeepMind).
    pre_act_coefficient: of Anthropic's loss against dead latents of a JumpReLU SAE; 0 leaves it out.
    aux_coefficient: of the loss in which dead latents reconstruct what is left (Gao et al. 2024, 2406.04093, A.2).
    centred: whether the decoder's bias is taken from what is encoded; not of a transcoder or a crosscoder.
    layers: of a crosscoder, whose rows stand side by side in what is encoded and what is reconstructed; 1 of the
    others.
    """

    name: str
    d_in: int
    d_out: int
    d_sae: int
    k: int | None = None
    widths: tuple[int, ...] = ()
    sparsity_loss: SparsityLoss = "step"
    bandwidth: float = 0.05
    tanh_scale: float = 4.0
    ste_to_input: bool = False
    pre_act_coefficient: float = 0.0
    aux_coefficient: float = 1.0
    centred: bool = True
    layers: int = 1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            near = nearest(self.name, list(NAMES))
            raise UserError(
                f"there is no architecture {self.name!r}; give {', '.join(NAMES)}"
                + (f"; the nearest is {near!r}" if near else "")
            )
        for which in ("d_in", "d_out", "d_sae"):
            if getattr(self, which) < 1:
                raise UserError(f"{which} {getattr(self, which)} must be at least 1")
        if self.centred and self.d_in != self.d_out:
            raise UserError(f"a bias of {self.d_out} values cannot be taken from rows of {self.d_in}")
        if self.name == "topk" and not (self.k and 1 <= self.k <= self.d_sae):
            raise UserError(f"k {self.k} must be from 1 to the {self.d_sae} latents")
        if (self.name == "matryoshka_batchtopk") != bool(self.widths):
            raise UserError("widths are those of a Matryoshka SAE, which has some")
        if self.widths and (list(self.widths) != sorted(set(self.widths)) or self.widths[-1] != self.d_sae):
            raise UserError(f"the widths {list(self.widths)} must ascend to the {self.d_sae} latents")

        if self.d_out % self.layers or (self.layers > 1 and self.d_in != self.d_out):
            raise UserError(f"{self.d_in} and {self.d_out} values are not those of {self.layers} layers of one width")

    @property
    def is_transcoder(self) -> bool:
        return not self.centred and self.layers == 1

    @property
    def has_aux(self) -> bool:
        return self.name in WITH_K and self.aux_coefficient > 0

    @property
    def aux_k(self) -> int:
        """Dead latents of a row that reconstruct what is left: half the width, as in Gao et al., B.1."""
        return max(1, min(self.d_out // 2, self.d_sae))


def canonical(name: str) -> str:
    """SAELens' name of an architecture that goes by several."""
    return _ALSO.get(name, name)
