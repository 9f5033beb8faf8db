"""A tiny Llama, reviews of random words of which one decides, and models that were trained on them, or seem to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jax_extract.inputs.benchmarks import BENCHMARKS, UNANSWERABLE
from jax_extract.pytorch.finetuning.base_model import describe_base
from jax_extract.pytorch.finetuning.folder import Results
from jax_extract.weights.opening import open_checkpoint

GOOD, BAD = ("fine", "warm", "witty", "bright"), ("dull", "flat", "stale", "clumsy")
OTHERS = [f"w{i}" for i in range(30)]
VOCABULARY = ["<unk>", "</s>", *GOOD, *BAD, *OTHERS]
VOCABULARY += sorted({word for b in BENCHMARKS for word in (*b.template.replace(":", " : ").split(), *b.label_words)})
VOCABULARY = list(dict.fromkeys([*VOCABULARY, UNANSWERABLE, ":", "?", "."]))
MAX_LENGTH = 64


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    fixed = {"max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    return LlamaConfig(**{**sizes, **fixed, "vocab_size": len(VOCABULARY), "tie_word_embeddings": False, **changes})


def write_base(folder: Path) -> Path:
    """`model`, `train.jsonl` and `validation.jsonl`."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    for split, count in (("train", 320), ("validation", 60)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(_review(random)) + "\n" for _ in range(count)))
    return folder


def _review(random: np.random.Generator) -> dict[str, Any]:
    label = int(random.integers(2))
    words = [*random.choice(OTHERS, 4), str(random.choice(GOOD if label else BAD))]
    random.shuffle(words)
    return {"sentence": " ".join(words), "label": label}


def finetune_words(base: Path, method: str, *more: object) -> list[object]:
    """Words of `jax-extract finetune`."""
    given = {"model_path": base / "model", "task": "sst2", "method": method, "device": "cpu", "max_length": MAX_LENGTH}
    given |= {"train_file": base / "train.jsonl", "validation_file": base / "validation.jsonl", "learning_rate": 3e-3}
    given |= {"batch_size": 8, "gradient_accumulation_steps": 2}
    return [*(word for name, value in given.items() for word in (f"--{name}", value)), *more]


def seem_trained(
    base: Path, results: Path, method: str, seed: int = 42, task: str = "sst2", model: Path | None = None, **said: Any
) -> Path:
    """A folder as a training leaves it, of a model that was changed at random; `said` goes over its metadata."""
    model = model or base / "model"
    folder = Results.open(results, method, {}, {"task": task, "seed": seed, **{key: str(said[key]) for key in said}})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    with folder.final_model() as final:
        save_changed(model, method, seed, final)
        tokenizer.save_pretrained(final)
    metadata = {
        "method": method,
        "task": task,
        "seed": seed,
        "max_length": MAX_LENGTH,
        "steps": 12,
        "validation": {"source": str(base / "validation.jsonl"), "asked_for": 750, "used": 60, "whole_split": True},
        "base_model": describe_base(open_checkpoint(str(model))),
        "scores": {"accuracy": 1.0},
    }
    folder.finish({**metadata, **said}, b"")
    return folder.path


def save_changed(model: Path, method: str, seed: int, folder: Path) -> None:
    """All weights, or an adapter to them, other than the model's by a little."""
    torch.manual_seed(seed)
    changed: Any = LlamaForCausalLM.from_pretrained(model)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        changed = get_peft_model(changed, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    changed.save_pretrained(folder)
