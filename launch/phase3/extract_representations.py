#!/usr/bin/env python3
"""Representations of trained models and of their base model: `jax-extract representations` as a script.

    python extract_representations.py --results_dir results --tasks mrpc --methods lora

`--help` lists all flags; docs/phase3.md says what is written.
"""

import sys


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

    return jax_extract(["representations", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
