"""The cases of the benchmark: named workloads, models, and what of them is kept.

In: names. Out: `Case`s; and in a scratch folder what every side reads: a Hugging Face folder `model/`, `prompts.jsonl`
for us and, for the peers, `tokens.json`, the same prompts as token ids. Subsets are drawn with a fixed seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from jax_extract.devices.sharding import dotted
from jax_extract.errors import UserError
from jax_extract.inputs.sources import open_source
from jax_extract.terminal import ranges_text
from jax_extract.weights.load import parameter_shapes
from jax_extract.weights.opening import open_checkpoint
from models.registry import port_for

ROOT = Path(__file__).resolve().parent.parent
GSM8K_HOME = "github.com/openai/grade-school-math (grade_school_math/data/test.jsonl)"
MODEL, PROMPTS, TOKENS = "model", "prompts.jsonl", "tokens.json"


@dataclass(frozen=True)
class Workload:
    """Prompts of `least` to `most` tokens; with `cut`, those of at least `most` tokens, cut there."""

    says: str
    least: int
    most: int
    cut: bool = False

    def takes(self, length: int) -> bool:
        return length >= self.most if self.cut else self.least <= length <= self.most


WORKLOADS = {
    "arc1024": Workload("ARC-AGI-1 prompts of up to 1,024 tokens", 1, 1024),
    "arc8192": Workload("long ARC-AGI-1 prompts: 1,025 to 8,192 tokens", 1025, 8192),
    "gsm8k": Workload("GSM8K questions", 1, 8192),
    "uniform512": Workload("ARC-AGI-1 prompts, the first 512 tokens of each", 512, 512, cut=True),
}

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
# Random weights: speed does not depend on them. `tiny` only shows that everything runs.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        **_QWEN2,
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
    },
    "gpt2-medium": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 50_257,
        "n_positions": 1_024,
        "n_embd": 1_024,
        "n_layer": 24,
        "n_head": 16,
    },
    "pythia-1.4b": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "vocab_size": 50_304,
        "hidden_size": 2_048,
        "intermediate_size": 8_192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 2_048,
    },
    "tiny": {
        **_QWEN2,
        "vocab_size": 49_152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8_192,
    },
}
MODELS = {
    "qwen2.5-0.5b": "the shape of Qwen2.5-0.5B with random weights",
    "gpt2-medium": "the shape of GPT-2-medium with random weights",
    "pythia-1.4b": "the shape of Pythia-1.4b with random weights",
    "smollm2": "SmolLM2-135M-Instruct",
    "tiny": "a toy with random weights, to try the benchmark itself",
}


@dataclass(frozen=True)
class Case:
    """What is measured at once; `dtype` is of the computation and of the stored rows."""

    workload: str
    model: str
    dtype: str
    layers: tuple[int, ...]
    positions: str
    prompts: int
    writes: bool = True

    @property
    def name(self) -> str:
        """As its result's file is called."""
        layers = ranges_text(self.layers).replace(", ", "+")
        ending = "" if self.writes else "_unwritten"
        return f"{self.workload}_{self.model}_{self.dtype}_layers{layers}_{self.positions}{ending}"


def parse_layers(text: str) -> tuple[int, ...]:
    """`10-23` or `12` or `3,5-7`; UserError."""
    layers: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(
                f"--layers {text!r} is not understood; write a layer or a range of them, such as 12 or 10-23"
            )
        layers |= set(range(int(first), int(last or first) + 1))
    if not layers:
        raise UserError(f"--layers {text!r} holds no layer; write the smaller one first, such as 10-23")
    return tuple(sorted(layers))


# -------------------------------------------------------------------------------------------- models


def prepare_model(name: str, scratch: Path) -> dict[str, Any]:
    """Writes the Hugging Face folder; returns its config.json.

    Random weights are stored in bfloat16, as the hub's Qwen2.5 is; SmolLM2's as its file gives them, in float32.
    """
    folder = scratch / MODEL
    folder.mkdir()
    real = open_checkpoint(str(assets() / "smollm2-135m-instruct.gguf"))
    if name in RANDOM_MODELS:
        config = RANDOM_MODELS[name]
        weights = random_weights(config)
    else:
        config = real.config
        weights = {tensor: real.read(tensor) for tensor in sorted(real.names())}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    real.tokenizer().save_pretrained(folder)
    return config


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """bfloat16 tensors of a model by their Hugging Face names; normal, scales of norms around one."""
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(shape, np.float32) * 0.02 + (len(shape) == 1 and name.endswith("weight"))).astype(
            ml_dtypes.bfloat16
        )
        for name, shape in _tensors(config)
    }


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as the port reads them."""
    port = port_for(config)
    read = port.config(config)
    parameters = parameter_shapes(port, read, read.num_hidden_layers, "float32", head=True)
    shapes = {dotted(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    for path, source in port.sources(read).items():
        for name, rows in zip(source.names, source.rows, strict=True):
            shape = (rows, *shapes[path][2 if source.per_layer else 1 :])
            for layer in range(read.num_hidden_layers if source.per_layer else 1):
                yield name.replace("{i}", str(layer)), shape[::-1] if source.transposed else shape


# ------------------------------------------------------------------------------------------- prompts


def prepare_prompts(case: Case, scratch: Path, gsm8k: str | None) -> list[int]:
    """Writes both forms of the prompts; returns their lengths in tokens."""
    workload = WORKLOADS[case.workload]
    tokenizer = open_checkpoint(str(scratch / MODEL)).tokenizer()
    texts = dict(gsm8k_texts(gsm8k) if case.workload == "gsm8k" else arc_texts())
    tokens = {key: tokenizer(text, verbose=False)["input_ids"] for key, text in texts.items()}
    fitting = [key for key in texts if workload.takes(len(tokens[key]))]
    if len(fitting) < case.prompts:
        raise UserError(f"{case.workload} has {len(fitting)} prompts; give --prompts a number up to that")
    chosen = [fitting[i] for i in np.random.default_rng(0).permutation(len(fitting))[: case.prompts]]
    with (scratch / PROMPTS).open("w", encoding="utf-8") as file:
        for key in chosen:
            file.write(json.dumps({"id": key, "text": texts[key]}) + "\n")
    cut = [tokens[key][: workload.most] for key in chosen]
    (scratch / TOKENS).write_text(json.dumps({"ids": chosen, "tokens": cut}), encoding="utf-8")
    return [len(ids) for ids in cut]


def arc_texts() -> Iterator[tuple[str, str]]:
    source = open_source(
        str(assets() / "arc-agi-1.json"),
        None,
        n_tasks=None,
        n_samples=None,
        encoder="digits",
        seed=0,
        split=None,
        dataset_config=None,
        text_column=None,
    )
    return ((sample.sample_id, sample.text) for sample in source.samples())


def gsm8k_texts(place: str | None) -> Iterator[tuple[str, str]]:
    """The questions of a file or URL: one JSON object a line with a `question`."""
    mend = f"give --gsm8k its .jsonl, a file or a URL; it is at {GSM8K_HOME}"
    if place is None:
        raise UserError(f"the workload gsm8k needs its questions; {mend}")
    try:
        if place.startswith(("http://", "https://")):
            with urllib.request.urlopen(place, timeout=60) as answer:
                content = answer.read().decode("utf-8")
        else:
            content = Path(place).expanduser().read_text(encoding="utf-8")
        questions = [json.loads(line)["question"] for line in content.splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--gsm8k {place!r} cannot be read ({error}); {mend}") from None
    return ((f"gsm8k_{number:05d}", question) for number, question in enumerate(questions))


def assets() -> Path:
    """The demo's model and tasks, fetched where they are missing."""
    command = [sys.executable, str(ROOT / "launch" / "demo_assets.py")]
    found = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise UserError("the demo's model and tasks could not be fetched; pip's own message is above")
    return Path(found.stdout.strip())
