#!/usr/bin/env python3
"""What the same command costs once its run has begun: until its first step, on a finished run, and in memory.

    python benchmarks/restart.py                                   1,000,000 samples of 12 tokens; some minutes
    python benchmarks/restart.py --samples 100000 --batch_sizes 512

A model of a single tiny layer, so that nothing is waited for but the command itself. The run is begun by the command,
without waiting for the disk, and killed before the record of its last part. `loading and compiling` is the command over
one sample, whose program is compiled already, as all are here. Everything is of a fresh process; processor seconds are
those of its threads and of the processes beside it. Memory is of the plan alone, a sample: of all pages that are in
memory (those of mapped files too, which the system takes back when it wants them) and of those that are the process's
own, at the most while the plan is made and when it is there; the token ids themselves are told beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from extraction import environment, flag
from machine import describe, title

LETTERS = "abcdefghijklmnopqrstuvwxyz      "
Told = dict[str, Any]


def main() -> int:
    if sys.argv[1:2] == ["begin"]:
        return _begin(sys.argv[2:])
    if sys.argv[1:2] == ["plan"]:
        print(json.dumps(_plan(json.loads(sys.argv[2]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=12, help="of a sample, within a third; default: 12")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[512, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where files go, and stay; by default they are removed")
    args = parser.parse_args()
    print(f"{title(describe())}; {args.samples:,} samples of {args.tokens} tokens\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        measure(args, Path(args.folder or temporary))
    return 0


def measure(args: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    make_model(folder / "model")
    prompts = make_prompts(folder / f"prompts{args.samples}.jsonl", args.samples, args.tokens)
    one = make_prompts(folder / "prompts1.jsonl", 1, args.tokens)
    for size in args.batch_sizes:
        run = folder / f"run{size}"
        options = {
            "model_path": str(folder / "model"),
            "layers_to_extract": 0,
            "shard_format": "safetensors",
            "batch_size": size,
        }
        of_all = {**options, "tasks_file": str(prompts)}
        fresh(["plan", json.dumps({**of_all, "activations_dir": str(folder / "none")})], folder)  # compiles nothing
        new = fresh(["plan", json.dumps({**of_all, "activations_dir": str(folder / "none")})], folder)
        parts = -(-args.samples // size)
        if not run.exists():
            kill = {"JAX_EXTRACT_FAILPOINT": f"part.record:before:{parts}"}
            began = command({**of_all, "activations_dir": str(run)}, folder, kill, ["begin"])
            print(f"batches of {size}: begun and killed, {began['processor']:.0f} processor s", flush=True)
        committed = len(list((run / "_run/commits").iterdir()))
        print(f"batches of {size}: {committed:,} of {parts:,} parts committed")
        again = fresh(["plan", json.dumps({**of_all, "activations_dir": str(run)})], folder)
        rows = {"loading and compiling": [], "the last part": [], "the finished run": []}
        for number in range(args.rounds):
            place, alone = folder / f"again{number}", folder / f"one{number}"
            shutil.copytree(run, place)
            rows["the last part"].append(command({**of_all, "activations_dir": str(place)}, folder))
            rows["the finished run"].append(command({**of_all, "activations_dir": str(place)}, folder))
            with_one = {**options, "tasks_file": str(one), "activations_dir": str(alone)}
            rows["loading and compiling"].append(command(with_one, folder))
            for made in (place, alone):
                shutil.rmtree(made)
        print(table(rows))
        print(memory(new, again, args.samples), flush=True)


def table(rows: Mapping[str, Sequence[Told]]) -> str:
    heads = ("processor s", "seconds", "to first step")
    lines = [f"{'fastest of ' + str(len(next(iter(rows.values())))):<26}" + "".join(f"{head:>16}" for head in heads)]
    for name, told in rows.items():
        steps = [one["first_step"] for one in told if one["first_step"] is not None]
        cells = [min(one["processor"] for one in told), min(one["seconds"] for one in told), min(steps, default=None)]
        lines.append(f"{name:<26}" + "".join(f"{'-' if cell is None else f'{cell:.2f}':>16}" for cell in cells))
    return "\n".join(lines)


def memory(new: Told, again: Told, samples: int) -> str:
    heads = ("at most", "in the end", "at most, own", "in the end, own", "token ids", "processor s")
    lines = [f"{'plan, bytes a sample':<26}" + "".join(f"{head:>16}" for head in heads)]
    for name, told in (("new", new), ("of the last part", again)):
        cells = [f"{told[key] / samples:.0f}" for key in ("most", "end", "most_own", "end_own", "token_ids")]
        cells.append(f"{told['processor']:.2f}")
        lines.append(f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------- processes


def fresh(words: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> Told:
    """What this script prints last, in a process of its own."""
    ended = subprocess.run(
        [sys.executable, __file__, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment(folder / "compiled"), **(env or {})},
    )
    if ended.returncode:
        raise SystemExit((ended.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return json.loads(ended.stdout.strip().splitlines()[-1])


def command(
    options: Mapping[str, Any], folder: Path, env: Mapping[str, str] | None = None, by: Sequence[str] = ()
) -> Told:
    """Runs the command; `by`: as this script starts it."""
    script = [__file__, *by] if by else ["-m", "jax_extract.cli"]
    flags = [word for name, value in options.items() for word in flag(name, value)]
    words = [sys.executable, *script, "extract", *flags]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, **environment(folder / "compiled"), "PYTHONPATH": path, **(env or {})}
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode and not by:
        raise SystemExit((ended.stderr.strip().splitlines() or ["it said nothing"])[-1])
    sessions = sorted(Path(options["activations_dir"]).glob("_run/sessions/*.json"), key=lambda p: p.stat().st_mtime)
    said = json.loads(sessions[-1].read_text()) if sessions else {}
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"processor": processor, "seconds": seconds, "first_step": said.get("first_step_seconds")}


def _begin(words: list[str]) -> int:
    """The command, which waits for no disk: it is killed by itself, and the machine stays."""
    os.fsync = lambda _: None
    from jax_extract.cli import main as run

    sys.argv[1:] = words
    return run()


def _plan(options: dict[str, Any]) -> Told:
    """Makes the plan as the command does, in this process; bytes beyond what the process had before."""
    from jax_extract.config import ExtractConfig
    from jax_extract.devices.processes import Processes
    from jax_extract.extraction.command import open_request
    from jax_extract.extraction.planned_input import PlannedInput
    from jax_extract.extraction.prepare import wrapping_of
    from jax_extract.extraction.resumption import Resumption
    from jax_extract.inputs.wrapping import Kept
    from jax_extract.terminal import Terminal

    config = ExtractConfig(**{**options, "layers_to_extract": (options["layers_to_extract"],)})
    processes = Processes()
    place, source, job = open_request(config, processes)
    _ = job.model.tokenizer("a")
    found = place.find(processes)
    settings = job.plan_settings(config, found.run["identity"]["plan_settings"] if found else None)
    job = job.under(settings)
    committed = place.committed(processes, found)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, began = _pages(), _processor()
    resumed = Resumption.of(source, found, committed, processes, Terminal(silent=True))
    wrapping = wrapping_of(config, Kept())
    planned = list(PlannedInput(source, job, settings, wrapping, None, resumed.kept, resumed.done).windows())
    parts = [part for each in planned for part in each.window.parts]
    job.step_counts(parts)
    after, seconds = _pages(), _processor() - began
    return {
        "most": after["VmHWM"] - before["VmRSS"],
        "end": after["VmRSS"] - before["VmRSS"],
        "most_own": after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"]),
        "end_own": after["RssAnon"] - before["RssAnon"],
        "token_ids": 4 * sum(part.tokens for part in parts),
        "processor": seconds,
    }


def _processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _pages() -> dict[str, int]:
    """Bytes of this process that are in memory, by the names that proc(5) has for them."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


# ------------------------------------------------------------------------------------------- what is read


def make_model(folder: Path) -> None:
    """A Qwen2 of one layer of width 8 with random weights; a token is a byte."""
    import safetensors.numpy
    import tokenizers
    from workloads import RANDOM_MODELS, random_weights

    folder.mkdir(exist_ok=True)
    sizes = {"vocab_size": 256, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = {**RANDOM_MODELS["tiny"], **sizes, "num_attention_heads": 2, "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(random_weights(config), folder / "model.safetensors", {"format": "pt"})
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def make_prompts(path: Path, samples: int, tokens: int) -> Path:
    if not path.exists():
        draw = random.Random(0)
        with path.open("w") as file:
            for number in range(samples):
                text = "".join(draw.choices(LETTERS, k=draw.randint(tokens - tokens // 3, tokens + tokens // 3)))
                file.write(json.dumps({"id": f"s{number:07d}", "text": text}) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
