"""The torch backend: one device, and Hugging Face's own forward on it.

In: `--device` and `--dtype`. Out: a `TorchBackend`, as `extraction.backend.Backend` asks for one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_extract.devices.platform import PlatformDefaults
from jax_extract.errors import UserError
from jax_extract.extraction.backend import Say, holds_several_a_row, silent
from jax_extract.forward.edits import Edits
from jax_extract.inputs.planning.slabs import PlanSettings, SlabShape
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from jax_extract.weights.unported import AllWeights
from models.capture_plan import CapturePlan
from models.ports import Port, hook_width, same_rotations_to

# Nothing is compiled, so that every shape is worth having; a GPU needs more tokens to be busy.
_CPU = PlatformDefaults("float32", 4_096, False, 1, 16, 0)
_GPU = PlatformDefaults("bfloat16", 16_384, False, 1, 64, 0)


@dataclass(frozen=True)
class TorchBackend:
    """See `Backend`.

    Attributes:
      device: `cpu`, `cuda` or `cuda:1`.
    """

    device: str
    dtype: str

    @classmethod
    def open(cls, device: str | None, dtype: str | None) -> TorchBackend:
        """UserError where torch is not installed, or has no such device."""
        if importlib.util.find_spec("torch") is None:
            raise UserError("--backend torch needs PyTorch, which is not installed; pip install 'jax_extract[torch]'")
        import torch

        device = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            found = torch.device(device)
        except RuntimeError:
            raise UserError(f"--device {device!r} is no device; give cpu, cuda or cuda:N") from None
        if found.type not in ("cpu", "cuda"):
            raise UserError(f"--device {device!r} is not supported; give cpu, cuda or cuda:N")
        if found.type == "cuda" and (count := torch.cuda.device_count()) <= (found.index or 0):
            raise UserError(
                f"--device {device!r} was asked for and torch finds {count} CUDA devices here; give --device cpu, or "
                "install torch for the GPU's driver"
            )
        defaults = _GPU if found.type == "cuda" else _CPU
        return cls("cpu" if found.type == "cpu" else device, dtype or defaults.dtype)

    @property
    def name(self) -> str:
        return "torch"

    @property
    def packages(self) -> tuple[str, ...]:
        return ("torch",)

    @property
    def defaults(self) -> PlatformDefaults:
        return _CPU if self.device == "cpu" else _GPU

    @property
    def devices(self) -> int:
        return 1

    @property
    def devices_of_host(self) -> int:
        return 1

    @property
    def device_kind(self) -> str:
        import torch

        return "cpu" if self.device == "cpu" else torch.cuda.get_device_name(self.device)

    @property
    def mesh_shape(self) -> Mapping[str, int]:
        return {"data": 1, "model": 1}

    def under(self, model: OpenModel, settings: PlanSettings | None) -> TorchBackend:
        if settings is not None and holds_several_a_row(settings):
            raise UserError(
                "this run packs several samples into a row, which --backend torch does not; resume it with --backend "
                "jax, or choose another --activations_dir"
            )
        return self

    def fingerprint(self) -> dict[str, str]:
        return {
            "backend": "torch",
            "dtype": self.dtype,
            "device_kind": self.device_kind,
            **{package: importlib.metadata.version(package) for package in ("torch", "transformers")},
            "numpy": np.__version__,
        }

    def pair_cost(self, model: OpenModel, plan: CapturePlan) -> float:
        return 0.0

    @property
    def attention_block(self) -> int:
        return 1

    def captured_bytes(self, plan: CapturePlan, model: OpenModel, shape: SlabShape) -> int:
        from jax_extract.pytorch.program import captured_bytes

        return captured_bytes(plan, _widths(plan, model), shape)

    def rows_travel(self, plan: CapturePlan, model: OpenModel, shapes: Iterable[SlabShape]) -> bool:
        return False

    def weights(self, model: OpenModel, plan: CapturePlan) -> Weights | AllWeights:
        if not isinstance(model.family, Port):
            return AllWeights(model.checkpoint)
        return Weights(model.checkpoint, model.port, model.config, plan.blocks_needed(model.config.num_hidden_layers))

    def forward(self, model: OpenModel) -> Any:
        """The whole model with its head: a `TorchForward`."""
        import torch

        from jax_extract.pytorch.forward import TorchForward
        from jax_extract.pytorch.loading import hooked_modules, load_ours, load_theirs, quiet

        is_port = isinstance(model.family, Port)
        load = load_ours if is_port else load_theirs
        with self._refusing(model), quiet():
            causal = load(model, model.config.num_hidden_layers, getattr(torch, self.dtype), head=True).to(self.device)
            base = getattr(causal.base_model, "language_model", causal.base_model)
            modules, device = hooked_modules(base, model), torch.device(self.device)
            return TorchForward(causal, base, modules, device, not is_port, same_rotations_to(model.config))

    @contextlib.contextmanager
    def _refusing(self, model: OpenModel) -> Iterator[None]:
        """UserError where the model does not fit, or transformers does not load or run it."""
        import torch

        if self.dtype == "float32":  # everywhere: a GPU's matrix units would round the operands
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                f"the model does not fit {self.device}; give --dtype bfloat16, or fewer layers, or a larger device"
            ) from None
        except (ValueError, OSError, ImportError, AttributeError, KeyError, TypeError, RuntimeError) as error:
            said = str(error).strip().partition("\n")[0]
            reason = said if said and not isinstance(error, KeyError) else f"{type(error).__name__} {said}".rstrip()
            raise UserError(
                f"transformers does not load or run {model.checkpoint.source} as a decoder with such hook points "
                f"({reason.rstrip('.')}); check the folder, or ask for other --hook_points"
            ) from None

    def program(
        self,
        model: OpenModel,
        plan: CapturePlan,
        weights: Any,
        shapes: Iterable[SlabShape],
        needed: Sequence[SlabShape],
        rows_travel: bool = False,
        edits: Edits | None = None,
        say: Say = silent,
    ) -> Any:
        import torch

        from jax_extract.pytorch.loading import hooked_modules, load_ours, load_theirs, quiet
        from jax_extract.pytorch.program import TorchProgram

        is_port = isinstance(model.family, Port)
        blocks = max(1, plan.blocks_needed(model.config.num_hidden_layers))
        load = load_ours if is_port else load_theirs
        with self._refusing(model), quiet():
            loaded = load(model, blocks, getattr(torch, self.dtype)).to(self.device)
            modules = hooked_modules(loaded, model)
            device = torch.device(self.device)
            program = TorchProgram(
                loaded,
                modules,
                plan,
                device,
                _widths(plan, model),
                needs_mask=not is_port,
                same_rotations_to=same_rotations_to(model.config),
                edits=edits,
            )
            program.try_out()
        return program


def _widths(plan: CapturePlan, model: OpenModel) -> dict[str, int]:
    return {hook: hook_width(model.config, hook, plan.pattern_tokens) for hook, _ in plan.layers}
