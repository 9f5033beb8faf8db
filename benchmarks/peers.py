#!/usr/bin/env python3
"""The peers, each run as well as it can be on our cases; in an environment of their own, without jax_extract.

    python benchmarks/peers.py NAME JOB.json     answers `run` (`peak` where NAME is torch)

In: a Hugging Face folder, prompts as token ids. Out: answers of `protocol.serve`, and the rows as safetensors, a file a
batch and layer; `order.json` says in which order the prompts went. For all of them: inference mode, prompts sorted by
length, batches of 8 (fewer where prompts are long), weights in the case's dtype, rows of real tokens written in that
dtype. Prompts are padded on the right without a mask: no real token of a causal model looks there, so attention
need not read one. Not timed: loading, and a warm-up batch.
"""

from __future__ import annotations

import importlib.metadata
import json
import operator
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import torch_peak
from protocol import Commands, serve
from safetensors.torch import save_file

BATCH = 8
BATCH_TOKENS = 16_384  # padding included; what eight long prompts would take beyond it is memory, not speed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = {
    "huggingface": ("torch", "transformers"),
    "nnsight": ("nnsight",),
    "transformer_lens": ("transformer-lens",),
    "sae_lens": ("sae-lens",),
    "torch": ("torch",),
}

Capture = Callable[[torch.Tensor], Mapping[int, torch.Tensor]]  # ids [rows, length] -> layer -> [rows, length, width]


def main() -> int:
    name, job_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    return serve(lambda: torch_commands(job) if name == "torch" else peer_commands(name, job))


def torch_commands(job: dict[str, Any]) -> Commands:
    return {"peak": lambda: {"flops_per_second": torch_peak(job["products"], job["dtype"])}}


# --------------------------------------------------------------------------------------- every peer


def peer_commands(name: str, job: dict[str, Any]) -> Commands:
    opener = {
        "huggingface": huggingface,
        "nnsight": nnsight,
        "transformer_lens": transformer_lens,
        "sae_lens": sae_lens,
    }
    prompts = json.loads(Path(job["tokens"]).read_text(encoding="utf-8"))["tokens"]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    groups = batches([prompts[i] for i in order])
    with torch.inference_mode():
        capture = opener[name](job)
        capture(padded(groups[-1]))  # the thread pool and the allocator start before the clock does

    def run() -> dict[str, Any]:
        out = Path(job["out"])
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / "order.json").write_text(json.dumps(order), encoding="utf-8")
        computed = 0
        started = time.perf_counter()
        with torch.inference_mode():
            for number, group in enumerate(groups, 1):
                ids = padded(group)
                computed += ids.numel()
                keep(capture(ids), [len(prompt) for prompt in group], job, out, number)
        seconds = time.perf_counter() - started
        versions = {package: importlib.metadata.version(package) for package in PACKAGES[name]}
        tokens = sum(map(len, prompts))
        return {"tokens": tokens, "slab_tokens": computed, "seconds": seconds, "versions": versions}

    return {"run": run}


def batches(longest_first: Sequence[list[int]]) -> list[list[list[int]]]:
    """Up to BATCH prompts each, and up to BATCH_TOKENS once they are padded."""
    groups: list[list[list[int]]] = []
    for prompt in longest_first:
        if not groups or len(groups[-1]) == BATCH or (len(groups[-1]) + 1) * len(groups[-1][0]) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(prompt)
    return groups


def padded(group: Sequence[list[int]]) -> torch.Tensor:
    ids = torch.zeros((len(group), len(group[0])), dtype=torch.long)
    for row, prompt in enumerate(group):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    return ids.to(DEVICE)


def keep(
    captured: Mapping[int, torch.Tensor], lengths: Sequence[int], job: dict[str, Any], out: Path, number: int
) -> None:
    """Rows of real tokens, or of the last one of each prompt, to the host and into files."""
    dtype = getattr(torch, job["dtype"])
    for layer in job["layers"]:
        block = captured[layer]
        if job["positions"] == "last":
            rows = block[torch.arange(len(lengths)), torch.tensor(lengths) - 1]
        else:
            rows = torch.cat([block[row, :length] for row, length in enumerate(lengths)])
        rows = rows.to(dtype).cpu()
        if job["writes"]:
            save_file({"activations": rows}, out / f"layer_{layer}_batch_{number:06d}.safetensors")


# ----------------------------------------------------------------------------------------- each peer


def huggingface(job: dict[str, Any]) -> Capture:
    """transformers done well: the base model without a head, cut above the deepest layer, forward hooks."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval().to(DEVICE)
    blocks = model.get_submodule(job["blocks"].partition(".")[2])
    del blocks[max(job["layers"]) + 1 :]
    captured: dict[int, torch.Tensor] = {}

    def hook(layer: int) -> Callable[..., None]:
        def store(_module: object, _inputs: object, output: Any) -> None:
            captured[layer] = output[0] if isinstance(output, tuple) else output

        return store

    for layer in job["layers"]:
        blocks[layer].register_forward_hook(hook(layer))

    def capture(ids: torch.Tensor) -> Mapping[int, torch.Tensor]:
        model(input_ids=ids, use_cache=False)
        return captured

    return capture


def nnsight(job: dict[str, Any]) -> Capture:
    """A trace that saves layer outputs and stops after the deepest one, so that no head is computed."""
    from nnsight import LanguageModel

    dtype = getattr(torch, job["dtype"])
    model = LanguageModel(job["model"], dtype=dtype, device_map=DEVICE, dispatch=True)
    layers = job["layers"]

    def capture(ids: torch.Tensor) -> Mapping[int, torch.Tensor]:
        with model.trace({"input_ids": ids}, use_cache=False) as tracer:
            saved = {}.save()
            for layer in layers:
                output = operator.attrgetter(job["blocks"])(model)[layer].output
                saved[layer] = output[0] if isinstance(output, tuple) else output
            tracer.stop()
        return saved

    return capture


def transformer_lens(job: dict[str, Any]) -> Capture:
    """The bridge of TransformerLens 3, stopped above the deepest layer where there is one above it."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(job["model"], dtype=getattr(torch, job["dtype"]), device=DEVICE)
    names = {layer: f"blocks.{layer}.hook_out" for layer in job["layers"]}
    above = max(job["layers"]) + 1
    stop = {"stop_at_layer": above} if above < len(bridge.blocks) else {"logits_to_keep": 1}

    def capture(ids: torch.Tensor) -> Mapping[int, torch.Tensor]:
        _, cache = bridge.run_with_cache(
            ids,
            return_cache_object=False,
            names_filter=list(names.values()),
            output_attentions=False,
            use_cache=False,
            **stop,
        )
        return {layer: cache[name] for layer, name in names.items()}

    return capture


def sae_lens(job: dict[str, Any]) -> Capture:
    """SAELens' activation store over the Hugging Face model, hooked at one layer and stopped there.

    Its own batching cuts texts into contexts of one length, which gives other rows; so the store is handed our batches.
    """
    import datasets
    from sae_lens.load_model import load_model
    from sae_lens.training.activations_store import ActivationsStore

    (layer,) = job["layers"]
    hook = f"{job['blocks']}.{layer}"
    model = load_model(
        "AutoModelForCausalLM",
        job["model"],
        DEVICE,
        {"dtype": getattr(torch, job["dtype"])},
        hook_names=[hook],
    )
    store = ActivationsStore(
        model=model,
        dataset=datasets.Dataset.from_dict({"tokens": [[0] * 8]}),
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=8,
        d_in=model.model.config.hidden_size,
        n_batches_in_buffer=1,
        total_training_tokens=1,
        store_batch_size_prompts=1,
        train_batch_size_tokens=1,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device(DEVICE),
        dtype=job["dtype"],
    )
    return lambda ids: {layer: store.get_activations(ids)}


if __name__ == "__main__":
    sys.exit(main())
