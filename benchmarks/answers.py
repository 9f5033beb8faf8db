#!/usr/bin/env python3
"""Greedy answers side by side: jax_extract and Hugging Face's `generate`, on the same prompts, in one go, in turn.

    python benchmarks/answers.py                            SmolLM2-135M, 8 prompts of 128 tokens, 64 new tokens each
    python benchmarks/answers.py --dtypes bfloat16 --new_tokens 256

Each side has a process of its own. A round is a whole batch: the prompts are read, then every answer is as long as
asked, whatever the model says of its end. Not timed: imports, loading, compiling, a first batch. Where a token differs
from Hugging Face's, later ones do too: the share of equal answers says how often that was, and near ties are why.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from machine import describe, title
from protocol import Commands, Side, serve

OURS, THEIRS = "jax_extract", "huggingface"


def main() -> int:
    if sys.argv[1:2] == ["serve"]:
        name, job = sys.argv[2], json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))
        return serve(lambda: {OURS: ours, THEIRS: huggingface}[name](job))
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--models", nargs="+", default=["smollm2"], help="as of extraction.py")
    words.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    words.add_argument("--batch_size", type=int, default=8, help="default: 8")
    words.add_argument("--prompt_tokens", type=int, default=128, help="default: 128")
    words.add_argument("--new_tokens", type=int, default=64, help="default: 64")
    words.add_argument("--rounds", type=int, default=5, help="default: 5")
    words.add_argument("--peers_python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    args = words.parse_args()
    print(title(describe()))
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            prepare(model, args, Path(folder))
            for dtype in args.dtypes:
                print(f"\n{model}, {dtype}: {compare(args, dtype, Path(folder))}", flush=True)
    return 0


def prepare(model: str, args: argparse.Namespace, folder: Path) -> None:
    """Writes the model, and prompts of one length as token ids."""
    from workloads import MODEL, arc_texts, prepare_model

    from jax_extract.weights.opening import open_checkpoint

    prepare_model(model, folder)
    tokenizer = open_checkpoint(str(folder / MODEL)).tokenizer()
    prompts = []
    for _, text in arc_texts():
        if len(ids := tokenizer(text, verbose=False)["input_ids"]) >= args.prompt_tokens:
            prompts.append(ids[: args.prompt_tokens])
        if len(prompts) == args.batch_size:
            break
    job = {"model": str(folder / MODEL), "prompts": prompts, "new_tokens": args.new_tokens}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")


def compare(args: argparse.Namespace, dtype: str, folder: Path) -> str:
    """Rounds in turn; a table."""
    from extraction import environment

    job = json.loads((folder / "job.json").read_text(encoding="utf-8")) | {"dtype": dtype}
    path = folder / f"{dtype}.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    python = {OURS: sys.executable, THEIRS: str(args.peers_python)}
    sides = {
        name: Side(
            [python[name], str(HERE / "answers.py"), "serve", name, str(path)],
            folder / f"{name}.log",
            environment(folder / "compiled"),
        )
        for name in python
    }
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            told[name].append(sides[name].ask("run"))
    for side in sides.values():
        side.close()
    new = args.batch_size * args.new_tokens
    speeds = {name: [new / answer["seconds"] for answer in answers] for name, answers in told.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    rounds = ", ".join(f"{a / b:.2f}" for a, b in zip(speeds[OURS], speeds[THEIRS], strict=True))
    equal = sum(a == b for a, b in zip(told[OURS][0]["answers"], told[THEIRS][0]["answers"], strict=True))
    lines = [f"{args.batch_size} prompts of {args.prompt_tokens} tokens, {args.new_tokens} new tokens each"]
    lines += [
        f"  {name:<14}{speed:>8.1f} new tokens/s   memory {told[name][-1]['peak_memory'] / 1e9:.2f}GB   "
        f"others {statistics.median(a['others'] for a in told[name]):.0%}"
        for name, speed in medians.items()
    ]
    lines.append(f"  {OURS} is {medians[OURS] / medians[THEIRS]:.2f} times as fast (by round: {rounds})")
    lines.append(f"  equal answers: {equal} of {args.batch_size}")
    return "\n".join(lines)


def ours(job: dict[str, Any]) -> Commands:
    import jax
    import numpy as np

    from jax_extract.extraction.jax_backend import compute_numerics, open_mesh, with_attention
    from jax_extract.generation.program import STEPS, AnswerProgram
    from jax_extract.generation.sampling import Sampling
    from jax_extract.weights.load import Weights
    from jax_extract.weights.open_model import OpenModel

    model, mesh = OpenModel.open(job["model"]), open_mesh(None)
    numerics = with_attention(compute_numerics(job["dtype"]), mesh, model.config)
    weights = Weights(model.checkpoint, model.port, model.config, model.config.num_hidden_layers, head=True)
    params = weights.load(mesh, numerics.dtype)
    program = AnswerProgram(model.port, model.config, params, mesh, numerics, Sampling(), ())
    prompts = np.asarray(job["prompts"], np.int32)
    rows, length = prompts.shape
    lengths, places = np.full(rows, length, np.int32), np.arange(rows, dtype=np.int32)
    columns = length + -(-job["new_tokens"] // STEPS) * STEPS
    slab = prompts.reshape(1, -1), lengths[None], places[None]

    def run() -> dict[str, Any]:
        started = time.perf_counter()
        state, told = program.start(lengths, places, length, columns), []
        state = program.ready(program.read(state, *slab))
        for _ in range(0, job["new_tokens"], STEPS):
            state, tokens, _ = program.answer(state)
            told.append(tokens)
        answers = np.concatenate(jax.device_get(told), axis=1)[:, : job["new_tokens"]]
        return {"seconds": time.perf_counter() - started, "answers": answers.tolist()}

    run()
    return {"run": run}


def huggingface(job: dict[str, Any]) -> Commands:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, job["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
    prompts, new = torch.tensor(job["prompts"]), job["new_tokens"]
    given = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}

    def run() -> dict[str, Any]:
        started = time.perf_counter()
        with torch.inference_mode():
            whole = model.generate(prompts, max_new_tokens=new, min_new_tokens=new, eos_token_id=None, **given)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "answers": whole[:, prompts.shape[1] :].tolist()}

    run()
    return {"run": run}


if __name__ == "__main__":
    sys.exit(main())
