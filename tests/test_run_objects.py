"""What a reader of a run holds: samples by place and id, whole sites, tokens beside rows, torch's tensors, short reprs.

Rows, tokens and positions that lie side by side belong together, whatever the order in which parts are stored; a tensor
has the bits of its array and its memory; what is saved is read back as it was; what cannot be is refused in words.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from small_run import make_model, run_cli, texts
from tiny_models import tiny_model
from transformers import PreTrainedTokenizerFast

import jax_extract
from jax_extract import Run, UserError, extract, open_activations
from jax_extract.store.memory import MemorySink
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.sample import ActivationBatch, SampleActivations
from jax_extract.store.token_text import token_texts
from jax_extract.store.writer import RowPiece

SITES = [Site("after_block", 3, 8), Site("after_block", 4, 8), Site("ffn_out", 3, 8), Site("final_norm", None, 8)]
LENGTHS = (4, 2, 5, 1, 3)


def row(site: Site, sample: int, position: int) -> float:
    return 1_000 * SITES.index(site) + 10 * sample + position


def small(dtype: str = "float32", positions: str = "all") -> Run:
    """Five samples in two parts, the last ones of the input first; token t of sample s is 10 s + t."""
    sink = MemorySink(SITES, dtype)
    for batch, samples in enumerate(([4, 2], [3, 0, 1]), 1):
        lengths = [LENGTHS[i] for i in samples]
        kept = [np.arange(n, dtype=np.int32) if positions == "all" else np.array([-1], np.int32) for n in lengths]
        content = PartContent(
            batch=batch,
            part=1,
            parts_in_batch=1,
            sample_indices=np.array(samples),
            sample_ids=tuple(f"s{i}" for i in samples),
            token_ids=tuple(np.arange(n, dtype=np.int32) + 10 * i for n, i in zip(lengths, samples, strict=True)),
            positions=tuple(kept),
            full_lengths=np.array(lengths, np.int64),
            meta=({},) * len(samples),
            plan="p",
        )
        part = sink.begin(content)
        for sample, places in zip(samples, kept, strict=True):
            blocks = {
                site.key: np.repeat(np.array([row(site, sample, p) for p in places], np.float32)[None, :, None], 8, 2)
                for site in SITES
            }
            part.append(blocks, [RowPiece(0, 0, len(places))], lambda: None)
        part.commit()
    return Run({"model_name": "m", "total_samples": 5}, SITES, sink.parts)


# ------------------------------------------------------------------------------------------ samples and sites


def test_a_sample_is_had_by_place_in_the_input_by_id_and_in_slices() -> None:
    run = small()
    assert len(run) == 5
    assert [sample.sample_id for sample in run] == run.sample_ids == ["s0", "s1", "s2", "s3", "s4"]
    assert (run[0].sample_id, run[-1].sample_id, run[np.int64(2)].sample_id, run["s3"].sample_index) == (
        "s0",
        "s4",
        "s2",
        3,
    )
    assert [sample.sample_id for sample in run[1:4:2]] == ["s1", "s3"]
    assert "s2" in run
    assert "s9" not in run
    with pytest.raises(IndexError, match=r"run\[5\]: this run holds 5 samples"):
        run[5]
    for wrong in (None, 1.5):
        with pytest.raises(UserError, match="is no sample; give run"):
            run[wrong]  # type: ignore[index]
    with pytest.raises(UserError, match="this run holds no sample 's9'"):
        run["s9"]


@pytest.mark.parametrize("positions", ["all", "mean"])
def test_all_rows_of_a_site_come_in_the_order_of_the_input_beside_whose_they_are(positions: str) -> None:
    run = small(positions=positions)
    rows, whose = run.get("ffn_out"), run.rows
    expected = [(i, p) for i, n in enumerate(LENGTHS) for p in (range(n) if positions == "all" else [-1])]
    assert list(zip(whose.sample_indices.tolist(), whose.positions.tolist(), strict=True)) == expected
    assert whose.token_ids.tolist() == [10 * i + p if p >= 0 else -1 for i, p in expected]
    assert rows[:, 0].tolist() == [row(SITES[2], i, p) for i, p in expected]
    for i, sample in enumerate(run):
        assert np.array_equal(rows[whose.row_offsets[i] : whose.row_offsets[i + 1]], sample.get("ffn_out"))
    for batch in run.batches(layer=4):
        of_rows = np.repeat(batch.sample_indices, np.diff(batch.row_offsets)).tolist()
        pairs = list(zip(of_rows, batch.positions.tolist(), strict=True))
        assert batch.token_ids.tolist() == [10 * i + p if p >= 0 else -1 for i, p in pairs]
        assert batch.activations[:, 0].tolist() == [row(SITES[1], i, p) for i, p in pairs]


def test_a_site_is_named_by_layer_by_hook_point_or_by_both_in_either_order() -> None:
    run = small()
    sample = run["s2"]
    for site, ways in {
        SITES[1]: [((4,), {}), ((), {"layer": 4}), (("blocks.4.hook_resid_post",), {}), (("after_block", 4), {})],
        SITES[2]: [(("ffn_out",), {}), ((3, "ffn_out"), {}), (("ffn_out",), {"layer": 3}), ((), {"hook": "ffn_out"})],
        SITES[3]: [(("final_norm",), {}), (("ln_final.hook_normalized",), {})],
    }.items():
        for given, named in ways:
            for read in (sample.get, run.get, lambda *a, **k: next(run.batches(*a, **k)).activations):
                assert read(*given, **named)[0, 0] // 1_000 == SITES.index(site)
    assert run.shuffled("blocks.4.hook_resid_post", rows=5, epochs=1).settings.sites == (SITES[1],)
    for given, told in (
        ((3, 4), "3 and 4 are both given"),
        (("ffn_out", "after_block"), "both given"),
        (("blocks.4.hook_resid_post", 3), "a hook point of layer 4 is named, and layer=3"),
        ((9,), r"holds no layer 9 of 'after_block'; it holds the layers \[3, 4\]"),
        ((), "say which layer of 'after_block'"),
    ):
        for read in (sample.get, run.get, run.batches):
            with pytest.raises(UserError, match=told):
                read(*given)


def test_a_run_that_memory_cannot_hold_is_refused_with_what_to_read_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_extract.store.reader.machine_bytes", lambda: 400)
    with pytest.raises(UserError, match=r"all 15 rows of this site take .*run\.batches"):
        small().get(3)


def test_nothing_that_is_printed_holds_numbers_of_rows() -> None:
    run = small("bfloat16")
    batch, shuffled = next(run.batches(3)), run.shuffled([3, 4], rows=5, epochs=1)
    said = {repr(each) for each in (run, run[0], batch, next(shuffled), shuffled, run.rows, run.parts[0].content)}
    assert said == {
        "Run('m', 5 samples, after_block, ffn_out, final_norm, layers 3-4)",
        "SampleActivations('s0', 4 tokens, 4 rows)",
        "ActivationBatch(batch 1, part 1: 2 samples, 8 x 8 bfloat16)",
        "ShuffledBatch(5 x 2 x 8 bfloat16, epoch 0)",
        "ShuffledRows(after_block 3, after_block 4: 3 batches of 5 rows an epoch)",
        "RunRows(5 samples, 15 rows)",
        "PartContent(batch 1, part 1: 2 samples, 8 rows)",
    }
    assert "layers" not in repr(Run({"model_name": "m"}, [SITES[3]], []))


def test_the_version_is_the_installed_one() -> None:
    assert jax_extract.__version__ == importlib.metadata.version("jax_extract")


# --------------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_tensor_has_the_bits_and_the_memory_of_its_array(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    run = small(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch, sample = next(run.batches(3, torch=True)), run["s2"].get(3, torch=True)
        whole = run.get(layer=3, torch=True)
    assert {t.dtype for t in (batch.activations, sample, whole)} == {getattr(torch, dtype)}
    assert whole.view(torch.uint8).numpy().tobytes() == run.get(3).tobytes()
    assert batch.activations.view(torch.uint8).numpy().tobytes() == next(run.batches(3)).activations.tobytes()
    assert sample.data_ptr() == run["s2"].get(3).ctypes.data
    assert isinstance(batch.token_ids, np.ndarray)
    assert "torch" in repr(batch)


def test_without_torch_what_needs_it_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    run = small()
    for read in (run[0].get, run.get, run.batches, run.shuffled):
        with pytest.raises(UserError, match="torch=True needs torch, which is not installed: pip install torch"):
            read(3, **({"rows": 5} if read == run.shuffled else {}), torch=True)
    with pytest.raises(UserError, match="for_torch needs torch"):
        run.shuffled(3, rows=5).for_torch()


# --------------------------------------------------------------------------------------------------- tokens


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's and Qwen's: single bytes and a few merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "th"), ("Ã", "©"), ("ð", "Ł")]
    vocabulary = {piece: n for n, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: spaces are written into pieces, what has none is bytes."""
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581the", "a", "t"]
    scores = {piece: n for n, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(scores, [], byte_fallback=True))
    replace, fallback, fuse = (
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    )
    backend.decoder = tokenizers.decoders.Sequence([replace, fallback, fuse, tokenizers.decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_the_tokens_of_a_byte_level_vocabulary_are_read_as_text_with_their_spaces() -> None:
    tokenizer = byte_level()
    text = "é the\n🙂"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id, 999]
    assert token_texts(tokenizer, ids) == ["é", " th", "e", "\n", r"\xf0\x9f", r"\x99", r"\x82", "<|end|>", "[999]"]
    whole = tokenizer("é the\n")["input_ids"]
    assert "".join(token_texts(tokenizer, whole)) == "é the\n"


def test_the_tokens_of_a_sentence_piece_vocabulary_keep_the_space_that_its_decoder_takes_away() -> None:
    tokenizer = sentence_piece()
    pieces = ["<s>", "\u2581the", "\u2581", "a", "<0x0A>", "<0xF0>"]
    ids = tokenizer.convert_tokens_to_ids(pieces)
    assert token_texts(tokenizer, ids) == ["<s>", " the", " ", "a", "\n", r"\xf0"]


def test_a_sample_and_batches_give_the_texts_of_their_rows(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    run = extract(str(model), {"a": "one two", "b": "thé"}, layers=3, positions="all")
    assert run["a"].tokens(tokenizer) == list("one two")
    assert run["a"].tokens(tokenizer, positions=[-1, 6, 0]) == ["mean", "o", "o"]
    assert run["b"].tokens(tokenizer, positions=run["b"].positions[2:]) == [r"\xc3", r"\xa9"]
    assert "".join(run.rows.tokens(tokenizer)[:7]) == "one two"
    (batch,) = run.batches(3)
    first = dict(zip(batch.sample_ids, batch.row_offsets, strict=False))["a"]
    assert "".join(batch.tokens(tokenizer)[first : first + 7]) == "one two"
    (shuffled,) = run.shuffled(3, rows=11, epochs=1)
    one = int(np.flatnonzero((shuffled.sample_indices == 0) & (shuffled.positions == 5))[0])
    assert shuffled.tokens(tokenizer)[one] == "w"
    with pytest.raises(UserError, match="'a' has no position 7; its 7 tokens have the positions 0 to 6"):
        run["a"].tokens(tokenizer, positions=[7])
    with pytest.raises(UserError, match="str 'gpt2' is no tokenizer"):
        run["a"].tokens("gpt2")


def test_a_position_behind_the_end_of_its_sample_is_damage() -> None:
    run = small()
    content: Any = run.parts[0].content
    object.__setattr__(content, "token_ids", (content.token_ids[0][:1], *content.token_ids[1:]))
    with pytest.raises(UserError, match="names a position behind the end of its sample"):
        list(run.batches(3))


# ------------------------------------------------------------------------------------------- saved, and live


@pytest.mark.parametrize(("shard_format", "dtype"), [("safetensors", "bfloat16"), ("pickle", "float32")])
def test_a_run_in_memory_that_is_saved_is_whole_and_read_back_as_it_was(
    model: Path, tmp_path: Path, shard_format: str, dtype: str
) -> None:
    given = texts([9, 30, 4, 17, 30, 3, 8])
    run = extract(str(model), given, layers=[3, 5], positions="all", batch_size=2, capture_dtype=dtype)
    run.save(tmp_path / "run", shard_format)
    again = open_activations(tmp_path / "run")
    assert again.sample_ids == run.sample_ids == [*given]
    for layer in (3, 5):
        assert again.get(layer).tobytes() == run.get(layer).tobytes()
    assert again.rows.token_ids.tolist() == run.rows.token_ids.tolist()
    assert again.metadata["total_samples"] == 7
    for words in (["status"], ["inspect"], ["verify"]):
        done = run_cli(*words, tmp_path / "run", cwd=tmp_path, script=None)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "verified" in done.stdout
    with pytest.raises(UserError, match="holds a run already; give another folder"):
        run.save(tmp_path / "run")
    with pytest.raises(UserError, match="shard_format 'zip' is not known; give one of pickle"):
        run.save(tmp_path / "other", "zip")
    for other in (again, pickle.loads(pickle.dumps(run))):
        with pytest.raises(UserError, match="only a run in memory is saved"):
            other.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_live_model_gives_the_rows_of_the_folder_that_it_would_be_saved_to(
    tmp_path: Path, family: str, dtype: str
) -> None:
    torch = pytest.importorskip("torch")
    live = copy.deepcopy(tiny_model(family)).to(getattr(torch, dtype))
    make_model(tmp_path)  # for its tokenizer
    live.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    options: dict[str, Any] = {"positions": "all", "dtype": "float32"}
    from_folder = extract(str(tmp_path), ["abc", "de"], **options)
    found = extract(live, ["abc", "de"], tokenizer=tokenizer, **options)
    assert found.sites == from_folder.sites
    for site in found.sites:
        where = (site.hook,) if site.layer is None else (site.layer, site.hook)
        assert found.get(*where).tobytes() == from_folder.get(*where).tobytes()
    found.save(tmp_path / "live")
    from_folder.save(tmp_path / "folder")
    identity = [json.loads((tmp_path / name / "_run/run.json").read_text())["identity"] for name in ("live", "folder")]
    assert identity[0] == identity[1]  # the checksum of the weights among it


def test_a_live_model_is_used_as_it_is_now_and_its_own_folder_has_the_tokenizer(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, layers=2))
    before = extract(live, ["abc"], layers=1).get(1)
    with torch.no_grad():
        live.model.layers[0].mlp.down_proj.weight.zero_()
    assert not np.array_equal(extract(live, ["abc"], layers=1).get(1), before)


def test_what_is_no_model_is_refused_with_what_to_give(model: Path) -> None:
    torch = pytest.importorskip("torch")
    live = copy.deepcopy(tiny_model("llama"))
    for wrong in (None, 7, torch.nn.Linear(2, 2)):
        with pytest.raises(
            UserError, match=r"is no model; give a Hugging Face folder, a hub id, a \.gguf file, or a model"
        ):
            extract(wrong, ["a"])
    with pytest.raises(UserError, match="came without a tokenizer; give it too, as in tokenizer=tokenizer"):
        extract(live, ["a"])
    with pytest.raises(UserError, match="tokenizer is for a model in memory"):
        extract(str(model), ["a"], tokenizer=byte_level())
    with pytest.raises(UserError, match="--backend torch loads a model by itself; give its folder or hub id"):
        extract(live, ["a"], tokenizer=byte_level(), backend="torch")
    with pytest.raises(UserError, match=r"tensor .* is held as float8_e4m3fn, which is not understood"):
        extract(live.to(torch.float8_e4m3fn), ["a"], tokenizer=byte_level())


def test_these_are_the_types_that_a_reader_meets() -> None:
    run = small()
    assert isinstance(run[0], SampleActivations)
    assert isinstance(next(run.batches(3)), ActivationBatch)
    assert run.get(3).dtype == np.float32
    assert small("bfloat16").get(3).dtype == ml_dtypes.bfloat16
