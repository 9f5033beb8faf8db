"""A tokenizer whose tokens are words between spaces, as the files that transformers loads.

In: a vocabulary, word -> token id. Out: tokenizer.json, tokenizer_config.json and vocab.json. It has no special token:
a vocabulary of nodes is exactly the nodes, and a word that is not in it is an error, never an unknown token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

VOCABULARY_FILE = "vocab.json"


def write_tokenizer(folder: Path, vocabulary: Mapping[str, int], max_length: int) -> None:
    """Adds the tokenizer's files to a model's folder."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(vocabulary)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    write_vocabulary(folder, vocabulary)


def write_vocabulary(folder: Path, vocabulary: Mapping[str, int]) -> None:
    text = json.dumps(dict(vocabulary), indent=0, ensure_ascii=False)
    (folder / VOCABULARY_FILE).write_text(text + "\n", encoding="utf-8")
