#!/usr/bin/env python3
"""From nothing to a page of features of a real model, on a laptop: texts, activations, SAEs, metrics, a page.

    python launch/demo_sae.py                       1,000 problems of GSM8K, from the Hugging Face hub
    python launch/demo_sae.py --texts texts.jsonl   texts of your own

In: SmolLM2-135M, which demo_assets.py fetches. Out: demo_output/sae/. Every command is shown before it runs. Where the
hub cannot be reached, the ARC tasks of the other demo take the place of GSM8K.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from demo_assets import MODEL, TASKS, fetch

TEXTS, ARC_TASKS = 1_000, 60
OUTPUT = Path("demo_output") / "sae"
LAYER = "12"


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--texts", help="what extract takes as --tasks_file, instead of GSM8K")
    args = words.parse_args()
    assets = fetch()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    given = ["--tasks_file", args.texts] if args.texts else gsm8k() or arc(assets)
    run, saes = str(OUTPUT / "activations"), OUTPUT / "saes"
    model = ["--model_path", str(assets / MODEL)]
    kept = ["--positions", "all", "--shard_format", "safetensors", "--activations_dir", run]
    call("extract", *model, *given, "--layers", LAYER, *kept, "--overwrite", "True")
    sizes = ["--k", "32", "--batch_size", "2048", "--learning_rate", "0.003", "--training_rows", "250000"]
    call("sae", "train", "--activations", run, *sizes, "--output_dir", str(saes), "--overwrite", "True")
    call("sae", "eval", str(saes), "--loss_samples", "8", "--rows", "8192", *model)
    [sae] = [path for path in saes.glob("layer_*") if "frozen" not in path.name]
    call("sae", "features", str(sae), "--rows", "100000", *model)
    return 0


def gsm8k() -> list[str] | None:
    """Questions with their answers, as a file; None where the hub cannot be reached."""
    file = OUTPUT / "gsm8k.jsonl"
    if not file.is_file():
        os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
        from datasets import load_dataset
        from huggingface_hub import HfApi

        try:
            HfApi().dataset_info("openai/gsm8k", timeout=10)
            rows = load_dataset("openai/gsm8k", "main", split=f"train[:{TEXTS}]")
        except Exception as error:  # noqa: BLE001 (whatever the libraries of the hub raise without a network)
            print(
                f"GSM8K cannot be fetched from the hub ({type(error).__name__}): ARC tasks take its place\n", flush=True
            )
            return None
        lines = [json.dumps({"text": f"{row['question']}\n{row['answer']}"}) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["--tasks_file", str(file)]


def arc(assets: Path) -> list[str]:
    return ["--tasks_file", str(assets / TASKS), "--n_tasks", str(ARC_TASKS)]


def call(*words: str) -> None:
    """Shows a command, and runs it; ends where it fails."""
    print(f"$ jax-extract {shlex.join(words)}", flush=True)
    done = subprocess.run([str(Path(sys.executable).parent / "jax-extract"), *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
