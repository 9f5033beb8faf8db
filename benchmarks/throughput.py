#!/usr/bin/env python3
"""Throughput of an extraction against Hugging Face transformers, side by side on the same ARC prompts.

    python benchmarks/throughput.py                      Qwen2.5-0.5B shape (random weights), float32
    python benchmarks/throughput.py --model smollm2      SmolLM2-135M's real weights

Both sides get the same token ids, keep layers 10-23 at all positions in float32 and write the same rows as
safetensors. Hugging Face runs as well as it can here: base model without a head, prompts sorted by length,
batches of 8, `inference_mode`, forward hooks. Each side has a process of its own; they run in turn, so that
the machine's drift meets both, and what is compared is the ratio of medians. Not timed: imports, loading,
planning, compilation. Between the rounds the machine's float32 matrix-product peak is measured on the model's shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS = list(range(10, 24))
BATCH = 8
PEAK_TOKENS = 2048


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=["qwen2.5-0.5b", "smollm2"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max_tokens", type=int, default=1024, help="only prompts up to this length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--worker", choices=["jax_extract", "huggingface"], help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve({"jax_extract": ours, "huggingface": huggingface}[args.worker](Path(args.scratch)))
    with tempfile.TemporaryDirectory() as scratch:
        figures = compare(args, Path(scratch))
    print_table(figures)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


# ------------------------------------------------------------------------------------ the comparison


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    prepare(args, scratch)
    sides = {name: Worker(name, scratch) for name in ("huggingface", "jax_extract")}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    peaks: list[float] = []
    try:
        for number in range(1, args.rounds + 1):
            for name, worker in sides.items():
                result = worker.ask("run")
                print(f"round {number}, {name}: {result['tokens'] / result['seconds']:.1f} tokens/s", file=sys.stderr)
                rounds[name].append(result)
            peaks.append(sides["jax_extract"].ask("peak")["flops_per_second"])
    finally:
        for worker in sides.values():
            worker.close()
    speed = {name: statistics.median(r["tokens"] / r["seconds"] for r in rs) for name, rs in rounds.items()}
    mine = rounds["jax_extract"][0]
    peak = statistics.median(peaks)
    flops_per_token = mine["flops"] / mine["tokens"]
    return {
        "model": args.model,
        "prompts": args.prompts,
        "tokens": mine["tokens"],
        "machine": f"{platform.machine()}, {cpu_name()}, {os.cpu_count()} cores",
        "versions": {**rounds["huggingface"][0]["versions"], **mine["versions"]},
        "tokens_per_second": speed,
        "ratio": speed["jax_extract"] / speed["huggingface"],
        "ratios_by_round": [
            (a["tokens"] / a["seconds"]) / (b["tokens"] / b["seconds"])
            for a, b in zip(rounds["jax_extract"], rounds["huggingface"], strict=True)
        ],
        "padding_waste": {name: 1 - rs[0]["tokens"] / rs[0]["slab_tokens"] for name, rs in rounds.items()},
        "compile_seconds": mine["compile_seconds"],
        "peak_memory_bytes": {name: max(r["peak_memory"] for r in rs) for name, rs in rounds.items()},
        "float32_peak_flops_per_second": peak,
        "share_of_peak": {name: value * flops_per_token / peak for name, value in speed.items()},
    }


def prepare(args: argparse.Namespace, scratch: Path) -> None:
    """Puts a Hugging Face folder `model/` and `prompts.jsonl` into the scratch folder."""
    import torch
    from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model
    from transformers.utils import logging

    from jax_extract.inputs.sources import open_source
    from jax_extract.weights.checkpoint import open_checkpoint

    logging.disable_progress_bar()
    root = Path(__file__).resolve().parent.parent
    assets = subprocess.run(
        [sys.executable, root / "launch" / "demo_assets.py"], check=True, capture_output=True, text=True
    ).stdout.strip()
    checkpoint = open_checkpoint(f"{assets}/smollm2-135m-instruct.gguf")
    tokenizer = checkpoint.tokenizer()
    if args.model == "smollm2":
        config = {k: v for k, v in checkpoint.config.items() if k not in ("model_type", "architectures")}
        model = LlamaModel(LlamaConfig(**config))
        prefix = "model."
        state = {n.removeprefix(prefix): torch.from_numpy(checkpoint.read(n)) for n in checkpoint.names()}
        model.load_state_dict(state)
    else:
        torch.manual_seed(0)
        shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        rope = {"rope_theta": 1e6, "rope_type": "default"}
        model = Qwen2Model(Qwen2Config(**shape, num_key_value_heads=2, vocab_size=151_936, rope_parameters=rope))
    model.save_pretrained(scratch / "model")
    tokenizer.save_pretrained(scratch / "model")
    source = open_source(
        f"{assets}/arc-agi-1.json",
        None,
        n_tasks=None,
        n_samples=None,
        encoder="digits",
        seed=0,
        split=None,
        dataset_config=None,
        text_column=None,
    )
    fitting = [s for s in source.samples() if len(tokenizer(s.text, verbose=False)["input_ids"]) <= args.max_tokens]
    order = torch.randperm(len(fitting), generator=torch.Generator().manual_seed(0))[: args.prompts].tolist()
    with (scratch / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for i in order:
            file.write(json.dumps({"id": fitting[i].sample_id, "text": fitting[i].text}) + "\n")


class Worker:
    """One side in a process of its own, asked over its standard input and output."""

    def __init__(self, name: str, scratch: Path) -> None:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--scratch", str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **cache},
        )

    def ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"error: the worker {self._process.args} stopped")
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(commands: dict[str, Callable[[], dict[str, Any]]]) -> int:
    for line in sys.stdin:
        memory = {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        print(json.dumps({**commands[line.strip()](), **memory}), flush=True)
    return 0


# ----------------------------------------------------------------------------------------- the sides


def ours(scratch: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    import importlib.metadata

    from jax_extract.config import ExtractConfig
    from jax_extract.extraction.command import extract_to_directory
    from jax_extract.extraction.prepare import OpenModel
    from jax_extract.terminal import Terminal

    model = OpenModel.open(str(scratch / "model"))

    def run() -> dict[str, Any]:
        config = ExtractConfig(
            model_path=str(scratch / "model"),
            tasks_file=str(scratch / "prompts.jsonl"),
            positions="all",
            shard_format="safetensors",
            dtype="float32",
            activations_dir=str(scratch / "ours"),
            overwrite=True,
        )
        metadata = extract_to_directory(config, Terminal(silent=True))
        session = metadata["sessions"][-1]
        lengths = [len(ids) for ids in _token_ids(scratch, model.tokenizer)]
        return {
            **{key: session[key] for key in ("tokens", "seconds", "slab_tokens", "compile_seconds")},
            "flops": sum(flops(model.config, n) for n in lengths),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        }

    return {"run": run, "peak": lambda: {"flops_per_second": float32_peak(model.config)}}


def flops(config: Any, tokens: int) -> float:
    """Of one prompt through the blocks that layers 10-23 need: matrix products and causal attention only.

    A product of [m, k] and [k, n] is 2 m k n. Per token and block: q, k, v, output, gate, up and down; query t
    meets t + 1 keys, twice (logits, mix).
    """
    blocks = max(LAYERS) + 1
    d, f, q, k = config.hidden_size, config.intermediate_size, config.query_rows, config.key_rows
    products = 2 * tokens * (d * (q + 2 * k) + q * d + 3 * d * f)
    attention = 2 * 2 * q * tokens * (tokens + 1) / 2
    return blocks * (products + attention)


def float32_peak(config: Any) -> float:
    """FLOP/s of XLA's float32 matrix product at the model's largest shape (gate and up), best of five."""
    import jax
    import jax.numpy as jnp

    d, f = config.hidden_size, 2 * config.intermediate_size
    x, w = jnp.ones((PEAK_TOKENS, d)), jnp.ones((f, d))
    product = jax.jit(lambda x, w: jnp.einsum("td,fd->tf", x, w, precision="highest"))
    product(x, w).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, w).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * PEAK_TOKENS * d * f / min(seconds)


def huggingface(scratch: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(scratch / "model")
    model = transformers.AutoModel.from_pretrained(scratch / "model", dtype=torch.float32).eval()
    del model.layers[max(LAYERS) + 1 :]  # it need not compute what nobody keeps
    captured: dict[int, Any] = {}
    for layer in LAYERS:
        model.layers[layer].register_forward_hook(
            lambda _module, _inputs, output, layer=layer: captured.__setitem__(
                layer, output[0] if isinstance(output, tuple) else output
            )
        )
    prompts = sorted(_token_ids(scratch, tokenizer), key=len, reverse=True)

    with torch.inference_mode():  # the thread pool and the allocator start before the clock does
        model(input_ids=torch.tensor([prompts[0]]), use_cache=False)

    def run() -> dict[str, Any]:
        out = scratch / "huggingface"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        slab_tokens = 0
        start = time.perf_counter()
        with torch.inference_mode():
            for number, first in enumerate(range(0, len(prompts), BATCH), 1):
                batch = prompts[first : first + BATCH]
                longest = len(batch[0])
                ids = torch.zeros((len(batch), longest), dtype=torch.long)
                mask = torch.zeros_like(ids)
                for row, prompt in enumerate(batch):
                    ids[row, : len(prompt)] = torch.tensor(prompt)
                    mask[row, : len(prompt)] = 1
                model(input_ids=ids, attention_mask=mask, use_cache=False)
                slab_tokens += ids.numel()
                for layer in LAYERS:
                    save_file(
                        {"activations": captured[layer][mask.bool()]},
                        out / f"layer_{layer}_batch_{number:06d}.safetensors",
                    )
        seconds = time.perf_counter() - start
        tokens = sum(map(len, prompts))
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"tokens": tokens, "seconds": seconds, "slab_tokens": slab_tokens, "versions": versions}

    return {"run": run}


def _token_ids(scratch: Path, tokenizer: Any) -> list[list[int]]:
    lines = (scratch / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]


# ---------------------------------------------------------------------------------------- the report


def print_table(figures: dict[str, Any]) -> None:
    print(f"\n{figures['model']}, float32, {figures['prompts']} ARC prompts, {figures['tokens']:,} real tokens")
    print(f"{figures['machine']}; " + ", ".join(f"{k} {v}" for k, v in figures["versions"].items()))
    print(f"float32 matrix-product peak {figures['float32_peak_flops_per_second'] / 1e9:.0f} GFLOP/s\n")
    print(f"{'':<14}{'tokens/s':>10}{'of peak':>10}{'padding':>10}{'memory':>10}")
    for name, speed in figures["tokens_per_second"].items():
        print(
            f"{name:<14}{speed:>10.1f}{figures['share_of_peak'][name]:>10.1%}"
            f"{figures['padding_waste'][name]:>10.1%}{figures['peak_memory_bytes'][name] / 1e9:>8.2f}GB"
        )
    by_round = ", ".join(f"{ratio:.2f}" for ratio in figures["ratios_by_round"])
    print(f"\njax_extract / huggingface: {figures['ratio']:.2f} (by round: {by_round})")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())
