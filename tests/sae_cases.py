"""Small sparse autoencoders of every architecture, ours and SAELens', from the same weights.

In: the name of a case. Out: an `Architecture` and what a step needs, and SAELens' trainer of the same; rows of a few
sparse directions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_extract.sae.architecture import Architecture

ROWS, D_IN, D_SAE, STEPS = 128, 24, 192, 200
WARM_UP, DECAY, DEAD_AFTER = 4, 10, 2
RATE = 1e-3


@dataclass(frozen=True)
class SaeCase:
    """Attributes:
    theirs: options of SAELens' configuration.
    ours: of `Architecture`; knobs: k and sparsity; warm_up: of the sparsity loss, in steps.
    """

    architecture: str
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    k: float = 0.0
    sparsity: float = 0.0
    warm_up: int = 0

    def architecture_of(self) -> Architecture:
        return Architecture(self.architecture, D_IN, D_IN, D_SAE, **self.ours)


CASES = {
    "standard": SaeCase("standard", {"l1_coefficient": 0.7, "l1_warm_up_steps": 5}, sparsity=0.7, warm_up=5),
    "topk": SaeCase("topk", {"k": 6}, {"k": 6}),
    "batchtopk": SaeCase("batchtopk", {"k": 6}, k=6),
    "jumprelu, step": SaeCase(
        "jumprelu",
        {"l0_coefficient": 0.3, "jumprelu_init_threshold": 0.05, "l0_warm_up_steps": 3},
        sparsity=0.3,
        warm_up=3,
    ),
    "jumprelu, tanh": SaeCase(
        "jumprelu",
        {
            "l0_coefficient": 0.3,
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_ste_to_input": True,
            "pre_act_loss_coefficient": 3e-3,
            "jumprelu_bandwidth": 0.5,
            "jumprelu_init_threshold": 0.1,
        },
        {"sparsity_loss": "tanh", "ste_to_input": True, "pre_act_coefficient": 3e-3, "bandwidth": 0.5},
        sparsity=0.3,
    ),
    "gated": SaeCase("gated", {"l1_coefficient": 0.7}, sparsity=0.7),
    "matryoshka": SaeCase(
        "matryoshka_batchtopk", {"k": 6, "matryoshka_widths": [16, 64, 192]}, {"widths": (16, 64, 192)}, k=6
    ),
}


def rows(batches: int, seed: int = 0) -> np.ndarray:
    """float32 [batches, ROWS, D_IN], of 60 directions of which few are there at once, about a mean that is not zero."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((60, D_IN))
    there = np.maximum(random.standard_normal((batches, ROWS, 60)) - 1.2, 0)
    return (there @ directions + 0.5).astype(np.float32)


def their_trainer(case: SaeCase) -> Any:
    """SAELens' trainer, on weights that are not symmetric and a bias that is not zero."""
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    kind, config = get_sae_training_class(case.architecture)
    torch.manual_seed(0)
    sae = kind(config(d_in=D_IN, d_sae=D_SAE, **case.theirs))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_enc += 0.01 * torch.randn(sae.W_enc.shape, generator=noise)
        sae.b_dec += 0.1 * torch.randn(sae.b_dec.shape, generator=noise)
    return SAETrainer(
        cfg=SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=STEPS * ROWS,
            device="cpu",
            autocast=False,
            lr=RATE,
            lr_end=RATE,
            lr_scheduler_name="constant",
            lr_warm_up_steps=WARM_UP,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=DECAY,
            n_restart_cycles=1,
            train_batch_size_samples=ROWS,
            dead_feature_window=DEAD_AFTER,
            feature_sampling_window=1_000,
            logger=LoggingConfig(log_to_wandb=False),
            n_batches_for_norm_estimate=1,
        ),
        sae=sae,
        data_provider=iter([]),
    )


def weights_of(sae: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in sae.named_parameters()}
