"""Texts to tables of tokens: the same in this process, in others beside it and in shares of several hosts.

Guarded: every sample's tokens, ids and counts against the tokenizer asked text by text; processes that fail, are lost
or are left behind; what is made ahead; shares of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from small_run import started
from test_tokens import CHAT, letters, turns
from transformers import PreTrainedTokenizerFast

from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.tokenize import tokenize, tokenized_tables
from jax_extract.inputs.tokenizing import pipeline, workers
from jax_extract.inputs.tokenizing.ahead import ahead
from jax_extract.inputs.tokenizing.collection import no_collection
from jax_extract.inputs.tokenizing.counts import InputCounts
from jax_extract.inputs.tokenizing.share import Share
from jax_extract.inputs.wrapping import Wrapping

ODD = ["ab", "<s>ab", "<s>", "", "<s><s>x", "é🙂", "a</s>", "<s>a</s>", "  ", "longer than what is kept of it", "x"]


def samples_of(texts: Sequence[str]) -> list[Sample]:
    return [Sample(f"s{i}", text, {"line": i}) for i, text in enumerate(texts)]


def table_of(
    samples: Sequence[Sample], tokenizer: Any, counts: InputCounts | None = None, most: int = 9, **more: Any
) -> list[tuple[Any, ...]]:
    """What is known of each sample."""
    wrapping = Wrapping(**more.pop("wrapping", {}))
    tables = tokenized_tables(samples, tokenizer, most, wrapping, counts or InputCounts(), **more)
    return [
        (s.sample_index, s.sample_id, s.token_ids.tolist(), s.full_length, s.meta) for table in tables for s in table
    ]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_SAMPLES", 3)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> list[workers.Workers]:
    """Two processes are started at the first chunk; which."""
    made: list[workers.Workers] = []

    class Noted(workers.Workers):
        def __init__(self, setup: workers.Setup, count: int) -> None:
            super().__init__(setup, count)
            made.append(self)

    monkeypatch.setattr(pipeline, "LARGE_SAMPLES", 0)
    monkeypatch.setattr(pipeline, "worth_starting", lambda: 2)
    monkeypatch.setattr(pipeline, "Workers", Noted)
    return made


def pids(made: Sequence[workers.Workers]) -> list[int]:
    return [process.pid for one in made for process in one._all]


def is_there(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError, FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("cores", "characters", "starts"), [(2, 10, True), (4, 2_000, False), (5, 2_000, True), (0, 10, False)]
)
def test_processes_are_started_where_they_are_faster_than_threads(
    beside: list[workers.Workers],
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    characters: int,
    starts: bool,
) -> None:
    monkeypatch.setattr(pipeline, "worth_starting", lambda: cores)
    table_of(samples_of(["ab" * (characters // 2)] * 2), letters())
    assert len(beside) == starts


@pytest.mark.usefixtures("small_chunks")
def test_every_text_has_the_tokens_that_the_tokenizer_gives_of_it_alone() -> None:
    samples = samples_of(ODD)
    samples[4] = dataclasses.replace(samples[4], text="", token_ids=(5, 6, 7))
    samples[5] = dataclasses.replace(samples[5], text="", token_ids=())
    counts, tokenizer = InputCounts(), letters()
    found = table_of(samples, tokenizer, counts)
    expected, chain = [], ""
    for i, sample in enumerate(samples):
        opened = sample.text.startswith("<s>")
        ids = tokenizer(sample.text, add_special_tokens=not opened)["input_ids"]
        ids = list(sample.token_ids) if sample.token_ids is not None else ids
        if ids:
            expected.append((i, f"s{i}", ids[:9], len(ids), {"line": i}))
            given = sample.text if sample.token_ids is None else str(ids)
            chain = hashlib.sha256(f"{chain}\ns{i}\n{given}".encode()).hexdigest()
    assert found == expected
    assert counts == InputCounts(
        samples=10,
        tokens=sum(len(ids) for _, _, ids, _, _ in expected),
        truncated_samples=1,
        truncated_tokens=31 - 9,
        longest_sample=31,
        empty_samples=1,
        first_empty_samples=["s5"],
        dataset_hash=chain,
        opened_samples=3,
        opening="<s>",
    )


@pytest.mark.usefixtures("small_chunks")
def test_processes_beside_this_one_give_the_same_and_end(beside: list[workers.Workers]) -> None:
    chat = [turns(("user", text), name=f"t{i}") for i, text in enumerate(ODD)]
    chat += [turns(("user", "a"), ("assistant", "b"), name="closed"), Sample("none", "", turns=())]
    mixed = [*samples_of(ODD * 3)[:-1], Sample("given", "", token_ids=tuple(range(40)))]
    mixed = [dataclasses.replace(sample, sample_id=f"m{i}") for i, sample in enumerate(mixed)]
    for tokenizer, samples, wrapping in (
        (letters(ends=True), mixed, {}),
        (letters(CHAT), chat, {"chat_template": True}),
    ):
        there, here = InputCounts(), InputCounts()
        found = table_of(samples, tokenizer, there, wrapping=wrapping)
        started_then = len(beside)
        with pytest.MonkeyPatch.context() as alone:
            alone.setattr(pipeline, "LARGE_SAMPLES", 1 << 40)
            assert found == table_of(samples, tokenizer, here, wrapping=wrapping)
        assert there == here and len(beside) == started_then > 0
    assert len(pids(beside)) == 4 and not any(map(is_there, pids(beside)))


@pytest.mark.usefixtures("small_chunks")
def test_a_small_input_and_a_tokenizer_in_python_start_no_process(beside: list[workers.Workers]) -> None:
    class Own(PreTrainedTokenizerFast):
        def __call__(self, *words: Any, **options: Any) -> Any:
            return super().__call__(*words, **options)

    def of_letters(texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) % 99 for letter in text] for text in texts]}

    own = Own(tokenizer_object=letters().backend_tokenizer)
    assert table_of(samples_of(ODD), own)[0][2] == letters()("ab")["input_ids"]
    assert table_of(samples_of(ODD), of_letters)[0][2] == [ord("a") % 99, ord("b") % 99]
    pipeline.LARGE_SAMPLES = 1_000  # put back by the fixture
    table_of(samples_of(ODD), letters())
    assert not beside


@pytest.mark.usefixtures("small_chunks")
def test_truncation_and_padding_that_a_tokenizer_was_left_with_do_not_count(beside: list[workers.Workers]) -> None:
    tokenizer = letters()
    expected = table_of(samples_of(ODD), tokenizer, most=100)
    tokenizer.pad_token = "</s>"
    tokenizer(ODD, padding=True, truncation=True, max_length=4)
    assert table_of(samples_of(ODD), tokenizer, most=100) == expected
    assert len(beside) == 2


def test_the_first_mistake_is_told_wherever_chunks_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_of(["a"] * 12)
    samples[7] = dataclasses.replace(samples[7], sample_id="s2")
    tokenizer = letters(more=["<new>"])

    def told(samples: Sequence[Sample]) -> str:
        said = set()
        for chunk in (1, 3, 256):
            monkeypatch.setattr(pipeline, "CHUNK_SAMPLES", chunk)
            with pytest.raises(UserError) as error:
                table_of(samples, tokenizer, vocab_size=258)
            said.add(str(error.value))
        assert len(said) == 1
        return said.pop()

    assert told(samples) == "sample id 's2' occurs twice in the input; ids must be unique"
    later = [*samples[:9], dataclasses.replace(samples[9], text="a<new>"), *samples[10:]]
    assert "'s2' occurs twice" in told(later)
    before = [*samples[:5], dataclasses.replace(samples[5], text="a<new>"), *samples[6:]]
    assert told(before) == (
        "sample 's5' has the token id 258 ('<new>') but the model knows 0 to 257; "
        "use the tokenizer that was saved with these weights"
    )


def test_what_fails_while_reading_comes_after_the_samples_before_it(
    small_chunks: None, beside: list[workers.Workers]
) -> None:
    def read() -> Iterator[Sample]:
        yield from samples_of(["ab"] * 9)
        raise UserError("line 10 is wrong")

    tables = tokenized_tables(read(), letters(), 9, Wrapping(), InputCounts())
    assert [len(next(tables)) for _ in range(3)] == [3, 3, 3]
    with pytest.raises(UserError, match="line 10 is wrong"):
        next(tables)
    assert beside and not any(map(is_there, pids(beside)))


def test_one_by_one_they_are_the_same() -> None:
    found = list(tokenize(samples_of(ODD), letters(), 9, Wrapping(), InputCounts()))
    assert [sample.sample_id for sample in found] == [f"s{i}" for i in range(len(ODD))]
    assert found[9].truncated and found[9].full_length == 31


# ---------------------------------------------------------------------------------------------- processes


def closed_vocabulary() -> Any:
    """A tokenizer of two words, which fails on others."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.usefixtures("small_chunks")
def test_a_text_that_a_tokenizer_fails_on_is_told_alike(beside: list[workers.Workers]) -> None:
    samples = samples_of(["a b"] * 4 + ["c"] + ["a"] * 20)
    said = []
    for large in (0, 1_000):
        pipeline.LARGE_SAMPLES = large  # put back by the fixture
        tables = tokenized_tables(samples, closed_vocabulary(), 9, Wrapping(), InputCounts())
        assert next(tables).sample_ids[2] == "s2"
        with pytest.raises(UserError, match=r"tokenizer fails on a text from 's3' to 's5' .*; give texts of its") as e:
            next(tables)
        said.append(str(e.value))
    assert said[0] == said[1] and len(beside) == 1 and not any(map(is_there, pids(beside)))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("lost", [1, 2])
def test_a_process_that_is_lost_costs_nothing_but_time(beside: list[workers.Workers], lost: int) -> None:
    samples, tokenizer = samples_of([f"text {i}" for i in range(60)]), letters()
    tables = tokenized_tables(samples, tokenizer, 9, Wrapping(), InputCounts())
    found = [next(tables)]
    for pid in pids(beside)[:lost]:
        os.kill(pid, signal.SIGKILL)
    found += tables
    for sample, got in zip(samples, itertools.chain.from_iterable(found), strict=True):
        assert got.token_ids.tolist() == tokenizer(sample.text)["input_ids"][:9]


ENDLESS = """
import sys
sys.path[:0] = sys.argv[1].split(":")
from test_tokens import letters
from jax_extract import interruption
from jax_extract.inputs.fields import Fields
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.tokenize import InputCounts, tokenized_tables
from jax_extract.inputs.tokenizing import pipeline, workers
from jax_extract.inputs.wrapping import Wrapping
import itertools, os

interruption.listen()
pipeline.LARGE_SAMPLES = 0
pipeline.worth_starting = lambda: 2
begin = workers._start
def start():
    process = begin()
    print(process.pid, flush=True)
    return process
workers._start = start
samples = (Sample(str(i), "some text") for i in itertools.count())
for number, _ in enumerate(tokenized_tables(samples, letters(), 9, Wrapping(), InputCounts())):
    if number == 3:
        print("going on", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_process_is_left_behind_and_nothing_is_said_of_it(name: str) -> None:
    parent = started(str(Path(__file__).parent), code=ENDLESS)
    lines = [parent.stdout.readline().strip() for _ in range(3)]
    beside = [int(line) for line in lines[:2]]
    assert lines[2] == "going on" and all(map(is_there, beside))
    if name != "SIGKILL":  # a terminal tells all of them, and so do batch systems
        for pid in beside:
            os.kill(pid, getattr(signal, name))
        time.sleep(0.05)
        assert all(map(is_there, beside)), "they end with their parent"
    os.kill(parent.pid, getattr(signal, name))
    _, said = parent.communicate(timeout=30)
    wait_until(lambda: not any(map(is_there, beside)))
    assert "Traceback" not in said and ("interrupted" in said) == (name == "SIGINT")


# -------------------------------------------------------------------------------------------------- ahead


def test_what_is_ahead_is_bounded_and_ends_with_its_reader() -> None:
    made: list[int] = []
    ended = threading.Event()

    def numbers() -> Iterator[int]:
        try:
            for number in itertools.count():
                made.append(number)
                yield number
        finally:
            ended.set()

    stream = ahead(numbers(), 2)
    assert next(stream) == 0
    wait_until(lambda: len(made) == 3)  # one in use, two ahead
    time.sleep(0.05)
    assert made == [0, 1, 2]
    assert [next(stream), next(stream)] == [1, 2]
    stream.close()
    assert ended.is_set() and made[-1] <= 4
    assert not any(thread.name == "jax_extract-ahead" for thread in threading.enumerate())


def test_a_failure_ahead_comes_in_its_place() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise UserError("no more")

    stream = ahead(numbers())
    assert next(stream) == 1
    with pytest.raises(UserError, match="no more"):
        next(stream)
    assert list(ahead([])) == [] and list(ahead("abc", 5)) == ["a", "b", "c"]


def test_the_collector_is_as_it_was_when_the_last_has_left() -> None:
    first, second = no_collection(), no_collection()
    with first:
        second.__enter__()
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------- shares


class Hosts:
    """Threads that exchange as processes do."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=20)
        self._given: list[bytes] = [b""] * count
        self.exchanges = 0

    def share(self, index: int) -> Share:
        def exchange(data: bytes) -> list[bytes]:
            self._given[index] = data
            self._barrier.wait()
            given = list(self._given)
            self.exchanges += index == 0
            self._barrier.wait()
            return given

        return Share(index, self.count, exchange)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What it gives or raises on each."""
        results: list[Any] = [None] * self.count

        def one(index: int) -> None:
            try:
                results[index] = work(index)
            except UserError as error:
                results[index] = error

        threads = [threading.Thread(target=one, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("hosts", "count"), [(2, 33), (3, 25), (4, 1)])
def test_shares_of_hosts_are_the_table_of_one(hosts: int, count: int) -> None:
    samples = [turns(("user", text), name=f"t{i}") for i, text in enumerate((ODD * 4)[:count])]
    samples[0] = turns(("user", "a"), ("assistant", "b"), name="t0")
    encoded = [0] * hosts
    together = Hosts(hosts)

    def work(index: int) -> Any:
        tokenizer, counts = letters(CHAT), InputCounts(chained=False)
        own = tokenizer.apply_chat_template

        def counted(*words: Any, **options: Any) -> Any:
            encoded[index] += 1
            return own(*words, **options)

        tokenizer.apply_chat_template = counted
        wrapping = {"chat_template": True}
        return table_of(samples, tokenizer, counts, wrapping=wrapping, share=together.share(index)), counts

    alone = InputCounts(chained=False)
    expected = table_of(samples, letters(CHAT), alone, wrapping={"chat_template": True})
    assert together.run(work) == [(expected, alone)] * hosts
    assert together.exchanges == -(-count // (3 * hosts)) + 1
    assert max(encoded) <= 3 * -(-count // (3 * hosts)) + 2, "each renders its own share, and tries the template twice"


@pytest.mark.usefixtures("small_chunks")
def test_what_one_host_fails_on_all_refuse_and_none_waits() -> None:
    samples = samples_of(["a b"] * 4 + ["c"] + ["a"] * 20)
    together = Hosts(3)
    said = together.run(lambda index: table_of(samples, closed_vocabulary(), share=together.share(index)))
    assert len(set(map(str, said))) == 1 and "tokenizer fails on a text from 's3' to 's5'" in str(said[0])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("other", [["a"] * 20, ["a"] * 18 + ["b"], ["a"] * 5])
def test_hosts_that_read_another_input_are_refused(other: list[str]) -> None:
    together = Hosts(2)
    texts = (["a"] * 19, other)
    said = together.run(lambda index: table_of(samples_of(texts[index]), letters(), share=together.share(index)))
    assert {str(error) for error in said} == {
        "the processes do not read the same input; make it the same on every host"
    }


SHARED = """
import sys
sys.path[:0] = [sys.argv[1]]
from test_tokens import letters
from jax_extract.devices.processes import start_processes
from jax_extract.inputs.fields import Fields
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.tokenize import InputCounts, tokenized_tables
from jax_extract.inputs.tokenizing import pipeline
from jax_extract.inputs.tokenizing.share import Share
from jax_extract.inputs.wrapping import Wrapping

pipeline.CHUNK_SAMPLES = 3
processes = start_processes("on", sys.argv[2], 2, int(sys.argv[3]))
share = Share(processes.index, processes.count, processes.gather_bytes)
samples = (Sample(f"s{i}", "text" * (i * 1000 if i % 7 == 0 else i)) for i in range(20))
tables = tokenized_tables(samples, letters(), 10**6, Wrapping(), InputCounts(), share=share)
print(*(len(ids) for table in tables for ids in [table.token_ids.tobytes()]), flush=True)
"""


def test_two_real_processes_share(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = str(Path(__file__).parent)
    running = [started(folder, address, index, code=SHARED, cwd=tmp_path) for index in range(2)]
    said = [process.communicate(timeout=60) for process in running]
    lengths = [4 * (i * 1_000 if i % 7 == 0 else i) + 1 for i in range(20)]
    expected = " ".join(str(4 * sum(lengths[i : i + 3])) for i in range(0, 20, 3))
    assert [out.strip() for out, _ in said] == [expected] * 2, said
