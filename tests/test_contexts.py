"""Texts joined into contexts: no token lost, none doubled, and every row knows which text it is of."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import make_model, run_here, whole_lines

from jax_extract import extract
from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.extraction.command import extract_to_directory
from jax_extract.extraction.prepare import Job
from jax_extract.inputs.contexts import ContextCounts, ContextForm, join
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.token_table import TokenizedSample, TokenTable
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.inputs.wrapping import Wrapping
from jax_extract.store.documents import Documents, Piece, pieces_of
from jax_extract.store.ledger import Ledger
from jax_extract.store.reader import open_activations
from jax_extract.store.storage.local import Directory
from jax_extract.terminal import Terminal
from jax_extract.verification import reference
from jax_extract.verification.command import verify

BOS, EOS = 0, 1


def documents(texts: Sequence[Sequence[int]]) -> list[TokenizedSample]:
    ids = [np.array(text, np.int32) for text in texts]
    return [TokenizedSample(i, f"d{i}", tokens, len(tokens), {}) for i, tokens in enumerate(ids)]


def joined(texts: Sequence[Sequence[int]], form: ContextForm) -> tuple[list[TokenizedSample], ContextCounts]:
    read, counts = InputCounts(), ContextCounts()

    def stream() -> Any:
        for document in documents(texts):
            read.add(document, str(document.token_ids))
            yield TokenTable.of([document])

    return list(itertools.chain.from_iterable(join(stream(), form, counts, read))), counts


def expected(texts: Sequence[Sequence[int]], form: ContextForm) -> list[list[int]]:
    """The contexts, token by token: a separator before a text that joins others, a start before every context."""
    contexts: list[list[int]] = [[]]

    def put(token: int, following: int | None = None) -> None:
        if len(contexts[-1]) == form.tokens:
            contexts.append([])
        if token != following:
            contexts[-1].append(token)

    for text in texts:
        for i, token in enumerate(text):
            if i == 0 and len(contexts[-1]) % form.tokens and form.separator is not None:
                put(form.separator, token)
            if len(contexts[-1]) % form.tokens == 0 and form.start is not None:
                put(form.start, token)
            put(token)
    return [context for context in contexts if context]


texts_of = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), max_size=12)
tokens_or_none = st.sampled_from([None, BOS, EOS])


@settings(deadline=None, max_examples=150)
@given(texts_of, st.integers(2, 17), tokens_or_none, tokens_or_none)
def test_no_token_is_lost_or_doubled_and_every_one_says_whose_it_is(
    texts: list[list[int]], tokens: int, start: int | None, separator: int | None
) -> None:
    form = ContextForm(tokens, start, separator)
    contexts, counts = joined(texts, form)
    assert [context.token_ids.tolist() for context in contexts] == expected(texts, form)
    assert all(context.length == tokens for context in contexts[:-1])
    back: dict[str, list[int]] = {f"d{i}": [] for i in range(len(texts))}
    added = 0
    for context in contexts:
        own = np.zeros(context.length, bool)
        for piece in pieces_of(context.sample_id, context.length, context.meta):
            assert piece.first == len(back[piece.document]), "a piece follows the one before"
            back[piece.document] += context.token_ids[piece.at : piece.at + piece.tokens].tolist()
            assert not own[piece.at : piece.at + piece.tokens].any()
            own[piece.at : piece.at + piece.tokens] = True
        assert set(context.token_ids[~own].tolist()) <= {start, separator}
        added += int((~own).sum())
    assert list(back.values()) == texts
    assert (counts.samples, counts.documents, counts.added_tokens) == (len(contexts), len(texts), added)
    assert counts.tokens == sum(map(len, texts)) + added == sum(context.length for context in contexts)
    assert [context.sample_index for context in contexts] == list(range(len(contexts)))
    assert len({context.sample_id for context in contexts}) == len(contexts)


@settings(deadline=None, max_examples=50)
@given(texts_of.filter(bool), st.integers(2, 17), tokens_or_none)
def test_the_table_says_of_every_row_what_the_pieces_say(
    texts: list[list[int]], tokens: int, separator: int | None
) -> None:
    contexts, _ = joined(texts, ContextForm(tokens, None, separator))
    pieces = [pieces_of(context.sample_id, context.length, context.meta) for context in contexts]
    table = Documents([[(i, piece)] for i, of_one in enumerate(pieces) for piece in of_one][::-1])
    rows = [(i, position) for i, context in enumerate(contexts) for position in range(context.length)][::-1]
    names, positions = table.of(np.array([i for i, _ in rows]), np.array([position for _, position in rows]))
    for (i, position), name, within in zip(rows, names.tolist(), positions.tolist(), strict=True):
        of = [p for p in pieces[i] if p.at <= position < p.at + p.tokens]
        assert (name, within) == ((of[0].document, of[0].first + position - of[0].at) if of else ("", -1))
        if of:
            assert texts[int(name[1:])][within] == contexts[i].token_ids[position]


def test_a_stream_without_end_is_joined_as_it_comes() -> None:
    read = InputCounts()

    def endless() -> Any:
        number = 0
        while True:
            row = TokenizedSample(number, f"d{number}", np.full(7, number, np.int32), 7, {"row": number})
            yield TokenTable.of([row])
            number += 1

    tables = join(endless(), ContextForm(16, None, None), ContextCounts(), read)
    contexts = itertools.chain.from_iterable(tables)
    first = [next(contexts) for _ in range(100)]
    assert first[99].sample_id == "context:000100"
    assert first[0].meta["pieces"][2] == {"document": "d2", "first": 0, "tokens": 2, "at": 14, "meta": {"row": 2}}


@pytest.mark.parametrize(
    ("asked", "bos", "eos", "form"),
    [
        ((None, None), 7, 9, (7, 7)),
        ((None, None), None, 9, (None, None)),
        (("none", "eos"), 7, 9, (None, 9)),
        (("bos", "none"), 7, None, (7, None)),
    ],
)
def test_the_tokens_between_are_those_asked_for_or_bos_where_there_is_one(
    asked: tuple[Any, Any], bos: int | None, eos: int | None, form: tuple[int | None, int | None]
) -> None:
    found = ContextForm.of(8, *asked, SimpleNamespace(bos_token_id=bos, eos_token_id=eos))
    assert (found.start, found.separator) == form


def test_a_token_that_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="--context_separator bos needs a tokenizer with such a token"):
        ContextForm.of(8, None, "bos", SimpleNamespace(bos_token_id=None, eos_token_id=3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context_start": "bos"}, "add --context_tokens N"),
        ({"context_tokens": 1}, "must be from 2 to"),
        ({"context_tokens": 64, "max_new_tokens": 3}, "answers each text by itself"),
        ({"context_tokens": 64, "one_file_per_layer": True}, "joins texts"),
        ({"context_tokens": 64, "max_seq_length": 32}, "is more than --max_seq_length 32"),
        ({"context_tokens": 2048}, "more than the 1024 positions this model allows"),
    ],
)
def test_what_contexts_cannot_be_is_said_in_one_sentence(
    options: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        run_here(folder / "model", folder / "in.jsonl", tmp_path / "a", **options)


def test_a_token_between_texts_that_the_model_does_not_know_is_refused(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "model")
    tokens = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**tokens, "bos_token": "<begin>"}))  # the 257th
    with pytest.raises(UserError, match="puts the token id 256 there but the model knows 0 to 255"):
        run_here(model, folder / "in.jsonl", tmp_path / "a", context_tokens=16)


TEXTS = {"one": "a" * 10, "long": "abcdefghij" * 7, "three": "xyz", "empty": "", "last": "0123456789"}
EMBEDDINGS: dict[str, Any] = {"hook_points": ("embeddings",), "positions": "all"}  # no block need be compiled for these


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contexts")
    make_model(folder / "model", layers=2)
    tokens = json.loads((folder / "model/tokenizer_config.json").read_text())
    (folder / "model/tokenizer_config.json").write_text(json.dumps({**tokens, "bos_token": "!", "eos_token": "~"}))
    lines = (json.dumps({"id": key, "text": text}) for key, text in TEXTS.items())
    (folder / "in.jsonl").write_text("\n".join(lines))
    return folder


def test_a_run_of_contexts_gives_their_rows_and_says_of_each_which_text_it_is_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExtractConfig(
        model_path=str(folder / "model"),
        tasks_file=str(folder / "in.jsonl"),
        activations_dir=str(tmp_path / "a"),
        context_tokens=32,
        context_separator="eos",
        **EMBEDDINGS,
    )
    metadata = extract_to_directory(config)
    told = next(line for line in whole_lines(capsys.readouterr().out).splitlines() if line.startswith("input"))
    assert told == (
        "input    in.jsonl: 4 texts in 4 contexts, 100 tokens (7 of them before contexts and between texts); "
        "1 text without a token left out"
    )
    assert (metadata["total_samples"], metadata["input"]["documents"], metadata["input"]["added_tokens"]) == (4, 4, 7)
    run = open_activations(tmp_path / "a")
    assert run.sample_ids == [f"context:{n:06d}" for n in range(1, 5)]
    rows: dict[str, dict[int, np.ndarray]] = {name: {} for name in TEXTS if name != "empty"}
    for sample in run.samples():
        got = sample.get(hook="embeddings")
        for row, (name, at) in enumerate(zip(sample.documents, sample.document_positions, strict=True)):
            if name:
                assert at not in rows[name]
                rows[name][int(at)] = got[row]
    assert {name: sorted(found) for name, found in rows.items()} == {
        name: list(range(len(TEXTS[name]))) for name in rows
    }
    alone = extract(str(folder / "model"), {name: TEXTS[name] for name in rows}, **EMBEDDINGS)
    for name, found in rows.items():
        np.testing.assert_array_equal(
            np.stack([found[i] for i in sorted(found)]), alone.sample(name).get(hook="embeddings")
        )
    assert run.sample("context:000001").pieces == (Piece("one", 0, 10, 1), Piece("long", 0, 20, 12))
    with run.shuffled(hook="embeddings", rows=8, epochs=1, drop_remainder=False) as batches:
        for batch in batches:
            names, positions = run.documents(batch.sample_indices, batch.positions)
            for row, name, at in zip(batch.activations, names.tolist(), positions.tolist(), strict=True):
                if name:
                    np.testing.assert_array_equal(row, rows[name][at])
    (batch,) = run.batches(hook="embeddings")
    names, _ = run.documents(np.repeat(batch.sample_indices, np.diff(batch.row_offsets)), batch.positions)
    assert (names != "").sum() == sum(map(len, TEXTS.values()))
    monkeypatch.setattr(reference, "torch_is_installed", lambda: False)  # our own forward is faster
    assert verify(str(tmp_path / "a"), samples=4, terminal=Terminal(silent=True)).verdict == "verified"
    identity = Ledger.open(Directory(tmp_path / "a")).run["identity"]
    assert identity["contexts"]["tokens"] == 32
    assert extract_to_directory(config)["total_samples"] == 4
    assert "everything was committed already" in capsys.readouterr().out
    with pytest.raises(UserError, match="--context_tokens was 32, is now 16"):
        extract_to_directory(dataclasses.replace(config, context_tokens=16))


def test_a_run_without_contexts_says_nothing_of_them_and_its_samples_are_its_documents(folder: Path) -> None:
    run = extract(str(folder / "model"), {"a": "abc", "b": "de"}, **EMBEDDINGS)
    assert "contexts" not in run.metadata and "documents" not in run.metadata["input"]
    names, positions = run.documents(np.array([1, 0, 0]), np.array([1, 2, -1]))
    assert (names.tolist(), positions.tolist()) == (["b", "a", "a"], [1, 2, -1])
    assert run.sample("a").documents.tolist() == ["a"] * 3
    with pytest.raises(UserError, match="no sample with the index 7"):
        run.documents(np.array([0, 7]), np.array([0, 0]))


def test_a_plan_of_contexts_holds_no_more_tokens_than_a_window_may(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax_extract.extraction.prepare._WINDOW_TOKENS", 64)
    config = ExtractConfig(model_path=str(folder / "model"), context_tokens=16, **EMBEDDINGS)
    job = Job.open(config)
    settings = job.plan_settings(config)
    counts = job.new_counts(settings)
    samples = [Sample(name, text) for name, text in TEXTS.items()]
    windows = list(job.windows(samples, settings, Wrapping(), counts))
    assert [sum(len(part) for part in window.parts) for window in windows] == [4, 3]
    assert isinstance(counts, ContextCounts) and (counts.samples, counts.documents) == (7, 4)
