#!/usr/bin/env python3
"""Samples to tables of token ids, against the tokenizer alone on all cores; rows read, and memory of what is kept.

    python benchmarks/tokenizing.py                          the tokenizer of the demo's model; some minutes
    python benchmarks/tokenizing.py --tokenizer FOLDER       another model's

Texts are English words of the tokenizer's own vocabulary, as often as words are in English (Zipf), one in ten joined
to another. `tokenizer alone` is `encode_batch_fast` of the tokenizers library over the same chunks: its threads use all
cores, and its result is thrown away. `in this process` makes tables with those threads, `with processes` from the first
chunk on with processes beside this one; `as commands do` starts these when the input has proven large. Samples are in
memory before, except where rows are read. Every side is a process of its own; all take turns, and what counts is the
ratio within a round. Tokens a second are those of the middle of the input: the start of processes is a part of small
inputs alone. Processor seconds are of all its processes and of all the input, the start of those beside it included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import Watch, describe, title

from jax_extract.inputs.fields import Fields
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.text import row_samples
from jax_extract.inputs.token_table import TokenTable, windows_of
from jax_extract.inputs.tokenize import InputCounts, tokenized_tables
from jax_extract.inputs.tokenizing import pipeline
from jax_extract.inputs.wrapping import Wrapping

LENGTHS = (12, 477, 4_800)  # tokens of a sample
SIDES = ("tokenizer alone", "in this process", "with processes", "as commands do")
ROWS = ("read", "read, in tables", "in tables, kept")
WINDOW = 65_536


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="a model; by default the demo's")
    parser.add_argument("--tokens", type=float, default=6e6, help="of each measurement")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a sample")
    parser.add_argument("--rows", type=int, default=1_000_000, help="for rows and bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(_measure(*args.side, args.tokenizer)))
        return 0
    if args.tokenizer is None:
        sys.path.insert(0, str(ROOT / "launch"))
        from demo_assets import MODEL, fetch

        args.tokenizer = str(fetch() / MODEL)
    print(title(describe()), flush=True)
    figures = {"machine": describe(), "tokens": _tokens(args), "rows": _rows(args)}
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _tokens(args: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"\n{'':34}M tokens/s  M tokens/CPU s  others  of the tokenizer alone, by round", flush=True)
    lines = []
    for length in args.lengths:
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(args.rounds):
            order = SIDES[number % 2 :] + SIDES[: number % 2]
            rounds.append({side: _side(args, side, length, int(args.tokens / length)) for side in order})
        for side in SIDES:
            shares = [one[side]["rate"] / one[SIDES[0]]["rate"] for one in rounds]
            of_side = [one[side] for one in rounds]
            rate, cpu, others = (statistics.median(one[name] for one in of_side) for name in ("rate", "cpu", "others"))
            lines.append({"length": length, "side": side, "rounds": of_side})
            by_round = ", ".join(f"{share:.0%}" for share in shares)
            said = f"{rate / 1e6:10.2f}{cpu / 1e6:16.2f}{others:8.0%}  {statistics.median(shares):.0%}   {by_round}"
            print(f"{length:>5} a sample, {side:18}{said}", flush=True)
    return lines


def _rows(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of one core, without a tokenizer: 12 tokens are the same for all."""
    print(f"\n{'rows of JSONL, 12 tokens each':34}rows/CPU s  others  bytes a row beside its tokens", flush=True)
    found = {}
    for kind in ROWS:
        said = found[kind] = _side(args, kind, 12, args.rows)
        bytes_said = "" if kind != ROWS[-1] else f"{said['bytes']:.0f}, at most {said['peak']:.0f} on the way"
        print(f"{kind:34}{said['rate']:10,.0f}{said['others']:8.0%}  {bytes_said}", flush=True)
    return found


def _side(args: argparse.Namespace, side: str, length: int, count: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--side", side, str(length), str(count), "--tokenizer", args.tokenizer]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)


# ------------------------------------------------------------------------------------------------- a side


def _measure(side: str, length: str, count: str, tokenizer: str) -> dict[str, float]:
    if side in ROWS:
        return _measure_rows(side, int(count))
    from jax_extract.weights.opening import open_checkpoint

    opened = open_checkpoint(tokenizer).tokenizer()
    samples = [Sample(f"row:{i}", text, {"line": i}) for i, text in enumerate(_texts(opened, int(length), int(count)))]
    if side == SIDES[1]:
        pipeline.LARGE_SAMPLES = pipeline.LARGE_CHARACTERS = sys.maxsize
    if side == SIDES[2]:
        pipeline.LARGE_SAMPLES = pipeline.FEW_CORES = 0
    alone = side == SIDES[0]
    chunks = [[sample.text for sample in chunk] for chunk in pipeline.chunks_of(samples)] if alone else []

    def pieces() -> Iterator[int]:
        if alone:
            encode = opened.backend_tokenizer.encode_batch_fast
            yield from (sum(map(len, encode(chunk))) for chunk in chunks)
            return
        counts = InputCounts(chained=False)
        tables = tokenized_tables(iter(samples), opened, sys.maxsize, Wrapping(), counts, len(opened))
        yield from (int(table.lengths.sum()) for table in tables)
        assert counts.samples == len(samples)

    arrived: list[tuple[float, int]] = []

    def work() -> int:
        done = 0
        for tokens in pieces():
            done += tokens
            arrived.append((time.perf_counter(), done))
        return done

    found = _timed(work)
    return {**found, "rate": _steady(arrived)}


def _steady(arrived: list[tuple[float, int]]) -> float:
    """Tokens a second without the first two fifths, in which processes start, and the last tenth, when work runs out.

    Args:
      arrived: when so many tokens were done.
    """
    total = arrived[-1][1]
    middle = [(at, done) for at, done in arrived if 0.4 * total <= done <= 0.9 * total]
    if len(middle) < 2:
        raise SystemExit("too few tokens for a rate; give --tokens more")
    (began, before), (ended, after) = middle[0], middle[-1]
    return (after - before) / (ended - began)


def _measure_rows(side: str, count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"text": f"some words of row {i} that are read here"}) + "\n" for i in range(count)
            )
        kept: list[TokenTable] = []
        before = _resident("VmRSS")

        def work() -> int:
            rows: Iterator[Sample] = row_samples(path, Fields())
            if side == ROWS[0]:
                return sum(1 for _ in rows)
            tables = tokenized_tables(rows, _constant, 100, Wrapping(), InputCounts(chained=False))
            if side == ROWS[1]:
                return sum(map(len, tables))
            kept.extend(table for table, _ in windows_of(tables, WINDOW))
            return sum(map(len, kept))

        found = _timed(work)
        tokens = 4 * 12 * count
        held, peak = (_resident(name) - before - tokens for name in ("VmRSS", "VmHWM"))
        return {**found, "rate": found["cpu"], "bytes": held / count, "peak": peak / count}


def _timed(work: Callable[[], int]) -> dict[str, float]:
    """What is done a second of the clock and of processors; the share of the machine that others had."""
    watch, cpu, began = Watch(), _cpu_seconds(), time.perf_counter()
    done = work()
    seconds, used = time.perf_counter() - began, _cpu_seconds() - cpu
    _, own, everyone = watch.read()
    others = max(0.0, (everyone * seconds + own - used) / seconds / (os.cpu_count() or 1))
    return {"rate": done / seconds, "cpu": done / used, "others": min(1.0, others)}


def _cpu_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def _resident(name: str) -> int:
    """Bytes of this process's memory now (`VmRSS`), or the most there were (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _constant(texts: list[str], **_: object) -> dict[str, list[list[int]]]:
    return {"input_ids": [[7] * 12 if text else [] for text in texts]}


def _texts(tokenizer: Any, length: int, count: int) -> Iterator[str]:
    """Of about so many tokens each."""
    chosen = random.Random(length)
    known = (word[1:] for word in tokenizer.backend_tokenizer.get_vocab() if word.startswith(("Ġ", "▁")))
    words = sorted(word for word in known if word.isascii() and word.isalpha() and word.islower() and len(word) > 2)
    chosen.shuffle(words)
    words = [word + chosen.choice(words) if chosen.random() < 0.1 else word for word in words[:20_000]]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    pool = chosen.choices(words, weights, k=1 << 20)
    some = pool[:10_000]
    per = max(1, round(length * len(some) / len(tokenizer.backend_tokenizer.encode(" ".join(some)))))
    for _ in range(count):
        at = chosen.randrange(len(pool) - per)
        yield " ".join(pool[at : at + per])


if __name__ == "__main__":
    sys.exit(main())
