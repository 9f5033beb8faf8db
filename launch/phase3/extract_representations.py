#!/usr/bin/env python3
"""Representations of trained models and of their base model: `jax-extract representations` as a script.

    python extract_representations.py --results_dir results --tasks mrpc --methods lora

`--help` lists all flags; docs/phase3.md says what is written.
"""

import sys
from pathlib import Path


def main() -> int:
    try:
        from jax_extract.cli import main as jax_extract
    except ModuleNotFoundError as missing:
        print(
            f"error: {missing.name} is not installed in this Python; activate the environment "
            "(source .venv/bin/activate) or install jax_extract (pip install -e '.[torch]')",
            file=sys.stderr,
        )
        return 2

    words = sys.argv[1:]
    results = Path(__file__).resolve().parents[2] / "results"
    if not any(word.startswith("--results") for word in words) and results.is_dir() and not Path("results").is_dir():
        words += ["--results_dir", str(results)]  # as vm1.sh does: documented to be started in this folder
    return jax_extract(["representations", *words])


if __name__ == "__main__":
    sys.exit(main())
