#!/usr/bin/env python3
"""Extraction on one host: the same command without a mesh to think about.

    python simple_extraction_inference.py --model_path MODEL --tasks_file arc_tasks.json

Edit the defaults of `SimpleExtractionConfig` or pass flags; `--help` lists them all.
"""

import os
import signal
import sys
from dataclasses import dataclass
from typing import List, Optional


@dataclass
class SimpleExtractionConfig:
    """Defaults of the one-host command; all its devices are used."""

    model_path: str = ""
    tasks_file: Optional[str] = None
    layers_to_extract: Optional[List[int]] = None
    batch_size: int = 8
    activations_dir: str = "activations"

    def __post_init__(self):
        if self.layers_to_extract is None:
            self.layers_to_extract = list(range(10, 24))


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

    return extract_command("simple_extraction_inference.py", SimpleExtractionConfig())


def interrupted(*_: object) -> None:
    """Ctrl-C while libraries are still imported; later jax_extract hears it."""
    print("interrupted; what is committed is safe: run the same command again to go on", file=sys.stderr, flush=True)
    os._exit(130)  # no exception: what imports swallows it


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)
    sys.exit(main())
