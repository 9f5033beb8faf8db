#!/usr/bin/env python3
"""Many edits of one prompt, side by side: `run_edits`, whole runs of our own, nnsight and TransformerLens, in turn.

    python benchmarks/edits.py                              SmolLM2-135M, 64 edits at layer 20, a prompt of 128 tokens
    python benchmarks/edits.py --layers 12 20 24 --rounds 5

An edit adds a vector to the residual stream behind a layer, at every token; what is asked is the log-probability of an
answer of four tokens. Each side has a process of its own and does it as well as it can: the peers take a batch of
edits in one forward, and logits of the answer's tokens alone where they offer that. Not timed: imports, loading,
compiling, a first round. The largest difference of two sides' numbers is printed.
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
from protocol import Commands, Side, in_turn, serve

OURS, WHOLE, PEERS = "run_edits", "whole runs", ("nnsight", "transformer_lens")
ANSWER_TOKENS = 4
PEER_BATCH = 16  # rows of a peer's forward: the fastest of 8, 16, 32 and 64


def main() -> int:
    if sys.argv[1:2] == ["serve"]:
        name, job = sys.argv[2], json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))
        sides = {OURS: ours, WHOLE: whole_runs, "nnsight": nnsight, "transformer_lens": transformer_lens}
        return serve(lambda: sides[name](job))
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--models", nargs="+", default=["smollm2"], help="as of extraction.py")
    words.add_argument("--layers", nargs="+", type=int, default=[20], help="default: 20")
    words.add_argument("--edits", type=int, default=64, help="default: 64")
    words.add_argument("--prompt_tokens", type=int, default=128, help="default: 128")
    words.add_argument("--rounds", type=int, default=3, help="default: 3")
    words.add_argument("--no_peers", action="store_true", help="our own two sides alone")
    words.add_argument("--peers_python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    args = words.parse_args()
    print(title(describe()))
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            job = prepare(model, args, Path(folder))
            for layer in args.layers:
                print(f"\n{model}, layer {layer}: {compare(args, {**job, 'layer': layer}, Path(folder))}", flush=True)
    return 0


def prepare(model: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes the model; a prompt and its answer as token ids."""
    from workloads import MODEL, arc_texts, prepare_model

    from jax_extract.weights.opening import open_checkpoint

    config = prepare_model(model, folder)
    tokenizer = open_checkpoint(str(folder / MODEL)).tokenizer()
    need = args.prompt_tokens + ANSWER_TOKENS
    texts = (tokenizer(text, verbose=False)["input_ids"] for _, text in arc_texts())
    tokens = next(ids[:need] for ids in texts if len(ids) >= need)
    prompt, answer = tokens[: args.prompt_tokens], tokens[args.prompt_tokens :]
    job = {"model": str(folder / MODEL), "prompt": prompt, "answer": answer, "edits": args.edits}
    return {**job, "blocks": "model.layers", "width": config["hidden_size"]}


def compare(args: argparse.Namespace, job: dict[str, Any], folder: Path) -> str:
    """Rounds in turn; a table."""
    from extraction import environment

    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    python = {OURS: sys.executable, WHOLE: sys.executable}
    if not args.no_peers:
        python |= dict.fromkeys(PEERS, str(args.peers_python))
    env = environment(folder / "compiled")
    sides = {
        name: Side([python[name], str(HERE / "edits.py"), "serve", name, str(path)], folder / "log", env)
        for name in python
    }
    told = in_turn(sides, args.rounds)
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in told.items()}
    lines = [f"{args.edits} edits of a prompt of {args.prompt_tokens} tokens and an answer of {ANSWER_TOKENS}"]
    for name, each in seconds.items():
        rounds = ", ".join(f"{theirs / ours:.2f}" for ours, theirs in zip(seconds[OURS], each, strict=True))
        differ = max(abs(a - b) for a, b in zip(told[OURS][0]["values"], told[name][0]["values"], strict=True))
        others = statistics.median(answer["others"] for answer in told[name])
        ratio = statistics.median(each) / statistics.median(seconds[OURS])
        lines.append(
            f"  {name:<17}{statistics.median(each):>8.2f} s   {OURS}: {ratio:.2f} times as fast (by round: {rounds})   "
            f"numbers differ by {differ:.1e}   others {others:.0%}"
        )
    return "\n".join(lines)


def vectors(job: dict[str, Any]) -> Any:
    """float32 [edits, width], the same on every side."""
    import numpy as np

    return 5.0 * np.random.default_rng(0).standard_normal((job["edits"], job["width"])).astype(np.float32)


# ------------------------------------------------------------------------------------------------ ours


def ours(job: dict[str, Any]) -> Commands:
    from jax_extract import Edit, answer_log_probability, load_model

    model = load_model(job["model"])
    metric = answer_log_probability(job["answer"])

    def run() -> dict[str, Any]:
        edits = [Edit("after_block", "add", layer=job["layer"], value=vector) for vector in vectors(job)]
        started = time.perf_counter()
        values = model.run_edits(job["prompt"], edits, metric).values[:, 0]
        return {"seconds": time.perf_counter() - started, "values": values.tolist()}

    run()
    return {"run": run}


def whole_runs(job: dict[str, Any]) -> Commands:
    from jax_extract import Edit, load_model

    model = load_model(job["model"])

    def run() -> dict[str, Any]:
        edits = [Edit("after_block", "add", layer=job["layer"], value=vector) for vector in vectors(job)]
        started = time.perf_counter()
        outcomes = [model.run(job["prompt"], edits=[edit], answers=job["answer"]) for edit in edits]
        values = [outcome.answers[0].log_probability for outcome in outcomes]
        return {"seconds": time.perf_counter() - started, "values": values}

    run()
    return {"run": run}


# ----------------------------------------------------------------------------------------------- peers


def batched(job: dict[str, Any], forward: Any) -> Commands:
    """`forward(ids, vectors [rows, 1, width])` gives logits [rows, answer tokens, vocabulary]."""
    import torch

    both = torch.tensor(job["prompt"] + job["answer"])
    answer = torch.tensor(job["answer"])
    added = torch.from_numpy(vectors(job))[:, None]

    def run() -> dict[str, Any]:
        started = time.perf_counter()
        values: list[float] = []
        with torch.inference_mode():
            for some in torch.split(added, PEER_BATCH):
                logits = forward(both.expand(len(some), -1), some).float()
                chosen = torch.log_softmax(logits, -1).gather(2, answer.expand(len(some), -1)[:, :, None])
                values += chosen.sum(dim=(1, 2)).tolist()
        return {"seconds": time.perf_counter() - started, "values": values}

    run()
    return {"run": run}


def nnsight(job: dict[str, Any]) -> Commands:
    import operator

    import torch
    from nnsight import LanguageModel

    model = LanguageModel(job["model"], dtype=torch.float32, device_map="cpu", dispatch=True)
    keep = len(job["answer"]) + 1

    def forward(ids: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        with model.trace({"input_ids": ids}, use_cache=False, logits_to_keep=keep):
            block = operator.attrgetter(job["blocks"])(model)[job["layer"]]
            if isinstance(block.output, tuple):
                block.output[0][:] += added
            else:
                block.output[:] += added
            logits = model.output.logits.save()
        return logits[:, :-1]

    return batched(job, forward)


def transformer_lens(job: dict[str, Any]) -> Commands:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(job["model"], dtype=torch.float32, device="cpu")
    keep = len(job["answer"]) + 1

    def forward(ids: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        def add(value: torch.Tensor, hook: Any) -> torch.Tensor:
            return value + added

        name = f"blocks.{job['layer']}.hook_out"
        logits = bridge.run_with_hooks(ids, fwd_hooks=[(name, add)], logits_to_keep=keep, use_cache=False)
        return logits[:, :-1]

    return batched(job, forward)


if __name__ == "__main__":
    sys.exit(main())
