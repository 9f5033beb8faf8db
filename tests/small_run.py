"""A tiny random Qwen2 folder, inputs and commands for tests of whole runs; made without torch.

One token is one byte of text, so a test chooses lengths in tokens by choosing lengths of texts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from command_server import Forked

from jax_extract.config import ExtractConfig
from jax_extract.extraction.command import extract_to_directory
from jax_extract.store.formats import load_shard
from jax_extract.terminal import Terminal

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "distributed_inference_with_activations.py"
LAYERS = 12
HIDDEN = 32


def make_model(folder: Path, *, layers: int = LAYERS, hidden: int = HIDDEN, seed: int = 0) -> Path:
    """Writes a qwen2 folder with random float32 weights and a tokenizer of single bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, num_hidden_layers=layers, hidden_size=hidden)
    write_weights(folder, random_weights(layers, hidden, seed))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: number for number, letter in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def write_config(folder: Path, **changes: Any) -> None:
    """config.json of the tiny model, with some fields changed (None takes one out)."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 256,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def random_weights(layers: int = LAYERS, hidden: int = HIDDEN, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of the tiny model by their Hugging Face names."""
    random = np.random.default_rng(seed)
    keys, inner = hidden // 2, 48
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        for name, shape in {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.v_proj.bias": (keys,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }.items():
            shapes[f"model.layers.{i}.{name}"] = shape
    return {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def write_weights(folder: Path, weights: Mapping[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})


def texts(lengths: Iterable[int], seed: int = 0) -> dict[str, str]:
    """Sample id -> a text of so many tokens; ids and order of lengths are unrelated."""
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    return {f"s{i:04d}": "".join(random.choice(letters, n - 1)) + "." for i, n in enumerate(lengths)}


def write_jsonl(path: Path, lengths: Iterable[int], seed: int = 0) -> Path:
    rows = (json.dumps({"id": key, "text": text}) for key, text in texts(lengths, seed).items())
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def write_arc(path: Path, tasks: int = 4) -> Path:
    """ARC tasks of one demonstration and one test input each."""
    pair = {"input": [[0, 1], [2, 3]], "output": [[3, 2], [1, 0]]}
    path.write_text(json.dumps({f"task{i:03d}": {"train": [pair], "test": [pair]} for i in range(tasks)}))
    return path


def whole_lines(said: str) -> str:
    """What was told, with every line that was too wide for a terminal as one again."""
    return re.sub(r"\n +(?=\S)", " ", said)


class Told(Terminal):
    """Keeps the lines that it is told."""

    def __init__(self, lines: list[str] | None = None) -> None:
        super().__init__(silent=True)
        self.lines: list[str] = [] if lines is None else lines

    def line(self, label: str, text: str) -> None:
        self.lines.append(f"{label} {text}")


def run_here(model: Path, tasks_file: Path | None, directory: Path, **options: Any) -> dict[str, Any]:
    """An extraction in this process, silent; returns the metadata."""
    tasks = None if tasks_file is None else str(tasks_file)
    config = ExtractConfig(model_path=str(model), tasks_file=tasks, activations_dir=str(directory), **options)
    return extract_to_directory(config, Terminal(silent=True))


def command(*words: object, script: Path | None = SCRIPT) -> list[str]:
    """A command line of the pod script, or of `jax-extract` where script is None."""
    start = [str(script)] if script else ["-m", "jax_extract.cli"]
    return [sys.executable, *start, *map(str, words)]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **(changes or {})}


def started(
    *words: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    script: Path | None = SCRIPT,
    code: str | None = None,
    largest_file: int | None = None,
) -> Forked:
    """The command, or a program of its own, in a process that goes on; see command_server.py."""
    said = list(map(str, words))
    env = environment(env)
    return Forked(said, code=code, script=None if code else script, cwd=cwd, env=env, largest_file=largest_file)


def run_cli(
    *words: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    script: Path | None = SCRIPT,
    code: str | None = None,
    largest_file: int | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own.

    Args:
      env: added to the environment.
      largest_file: a limit in bytes.
      fresh: in an interpreter that is started for it, as a user does.
    """
    if fresh:
        assert code is largest_file is None
        return subprocess.run(
            command(*words, script=script),
            cwd=cwd,
            env=environment(env),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    with started(*words, cwd=cwd, env=env, script=script, code=code, largest_file=largest_file) as process:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return subprocess.CompletedProcess(list(map(str, words)), process.wait(), out, err)


def shards(directory: Path) -> dict[str, bytes]:
    """Every shard of a run by file name."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if "_batch_" in path.name}


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def committed_ids(directory: Path, layer: int, suffix: str = "pkl") -> list[str]:
    """The sample ids in the shards of a layer, sorted, as often as they are there."""
    found = [load_shard(p)["sample_ids"] for p in sorted(directory.glob(f"layer_{layer}_batch_*.{suffix}"))]
    return sorted(str(i) for ids in found for i in ids)
