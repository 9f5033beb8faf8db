#!/usr/bin/env python3
"""Distributed inference that keeps activations: the pod command.

    python distributed_inference_with_activations.py --model_path MODEL --tasks_file arc_tasks.json \\
        --batch_size 8 --mesh_shape 8,8

Edit the defaults of `DistributedARCConfig` or pass flags; `--help` lists them all. The work is done by
jax_extract, to which the configuration is handed once; importing this file starts no device.
"""

import os
import signal
import sys
from dataclasses import dataclass, field
from typing import List, Optional


@dataclass
class DistributedARCConfig:
    """Defaults of the pod command. Flags, and a YAML file given as --config, go over them."""

    model_path: str = ""
    tasks_file: Optional[str] = None
    layers_to_extract: List[int] = field(default_factory=lambda: list(range(10, 24)))
    batch_size: int = 8
    mesh_shape: Optional[str] = None
    activations_dir: str = "activations"
    gcs_bucket: Optional[str] = None
    upload_to_cloud: bool = False


def main() -> int:
    try:
        from jax_extract.cli import extract_command
    except ModuleNotFoundError as missing:
        print(
            f"error: {missing.name} is not installed in this Python; activate the environment "
            "(source .venv/bin/activate) or install jax_extract (pip install -e .)",
            file=sys.stderr,
        )
        return 2

    return extract_command("distributed_inference_with_activations.py", DistributedARCConfig())


def interrupted(*_: object) -> None:
    """Ctrl-C while libraries are still imported; later jax_extract hears it."""
    print("interrupted; what is committed is safe: run the same command again to go on", file=sys.stderr, flush=True)
    os._exit(130)  # no exception: what imports swallows it


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)
    sys.exit(main())
