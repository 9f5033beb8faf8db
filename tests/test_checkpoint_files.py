"""Promises about a model's folder as users have it: the file that transformers reads is the one that counts, tensors
that nobody reads do not matter, what may matter is refused by name, and a folder without weights says what to do.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import make_model, write_jsonl
from tiny_models import tiny_folder
from transformers import AutoModelForCausalLM

from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.extraction import command
from jax_extract.pytorch.loading import load_theirs
from jax_extract.weights import hub
from jax_extract.weights.checkpoint import SafetensorsFiles
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from jax_extract.weights.opening import open_checkpoint

Tensors = dict[str, torch.Tensor]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def opened(folder: Path, head: bool = False) -> Weights:
    model = OpenModel.open(str(folder))
    return Weights(model.checkpoint, model.port, model.config, model.config.num_hidden_layers, head)


def read(folder: Path, head: bool = False) -> dict[str, np.ndarray]:
    """Stored name -> values, of every tensor that a run reads."""
    weights = opened(folder, head)
    return {name: weights.checkpoint.read(name).astype(np.float32) for name in weights.tensor_names()}


def require_theirs(folder: Path) -> None:
    """What is read here is what transformers reads of the same folder."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = theirs.state_dict()
    mine = read(folder)
    assert len(mine) > 10
    for name, values in mine.items():
        expected = whole["lm_head.weight" if name == "embed_out.weight" else name]
        np.testing.assert_array_equal(values, expected.numpy(), err_msg=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of five blocks."""
    return copied("llama", tmp_path / "model")


def copied(family: str, folder: Path) -> Path:
    shutil.copytree(tiny_folder(family), folder)
    return folder


def change(folder: Path, added: Mapping[str, torch.Tensor | None], name: str = WHOLE) -> None:
    """Adds tensors, or takes those out that are None."""
    tensors = {**load_file(folder / WHOLE), **added}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, folder / name, {"format": "pt"})


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def scaled(by: float) -> Tensors:
    """Other weights of the same model."""
    return {name: tensor * by for name, tensor in load_file(tiny_folder("llama") / WHOLE).items()}


def write_pieces(folder: Path, tensors: Tensors, count: int = 3, index: str | None = INDEX) -> list[Path]:
    names = sorted(tensors)
    paths = [folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        save_file({name: tensors[name] for name in names[number::count]}, path, {"format": "pt"})
    if index:
        where = {name: paths[number % count].name for number, name in enumerate(names)}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return paths


# ------------------------------------------------------------------------------- tensors that nobody reads

MASKS = {"gpt_neox": "gpt_neox.layers.{}.attention.", "gpt2": "transformer.h.{}.attn."}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
@pytest.mark.parametrize("family", MASKS)
def test_masks_and_tables_of_any_dtype_do_not_decide_whether_a_model_opens(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    added: Tensors = {"some.position_ids": torch.arange(9)[None]}
    for layer in range(4):
        prefix = MASKS[family].format(layer)
        added[f"{prefix}bias"] = torch.ones(1, 1, 512, 512).tril().to(dtype)
        added[f"{prefix}masked_bias"] = torch.tensor(-1e9)
        added[f"{prefix}rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float16)
        added[f"{prefix}_extra_state"] = torch.zeros(0, dtype=torch.uint8)
    folder = copied(family, tmp_path / "model")
    change(folder, added)
    assert opened(folder).notes == ()
    require_theirs(folder)


def test_a_tensor_that_is_read_must_have_a_dtype_that_is_understood(folder: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    for dtype, stored_as in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int64, "I64")):
        change(folder, {name: load_file(tiny_folder("llama") / WHOLE)[name].to(dtype)})
        with pytest.raises(UserError, match=rf"'{name}' in .*{WHOLE} is stored as {stored_as}.*F64, F32, F16, BF16"):
            opened(folder)


def test_the_digest_is_of_names_dtypes_shapes_and_bytes_whatever_the_dtype(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0).half(),
        "mask": torch.tensor([[True, False]]),
        "empty": torch.zeros(0, 4),
        "weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    files = SafetensorsFiles([tmp_path / "x.safetensors"])
    total = hashlib.sha256()
    for name, dtype, shape in (
        ("empty", "F32", "[0, 4]"),
        ("mask", "BOOL", "[1, 2]"),
        ("scalar", "F16", "[]"),
        ("weight", "BF16", "[2, 2]"),
    ):
        total.update(
            f"{name} {dtype} {shape}\n".encode()
            + tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    assert files.digest(files.names()) == f"sha256:{total.hexdigest()}"
    assert (files.read("scalar").shape, files.read("empty").shape) == ((), (0, 4))
    np.testing.assert_array_equal(files.read("weight", slice(1, 2)), np.array([[3, 4]], ml_dtypes.bfloat16))


def test_what_lies_outside_the_decoder_is_told_and_passed_over(folder: Path) -> None:
    outside = ["mtp.fc.weight", "score.weight", "v_head.summary.weight", "model.vision_tower.embed.weight"]
    change(folder, {name: torch.ones(2, 54) for name in outside})
    [note] = opened(folder).notes
    assert "outside the decoder" in note
    assert all(name in note for name in sorted(outside)[:3])
    require_theirs(folder)


def test_blocks_beyond_the_configuration_are_told_and_passed_over(folder: Path) -> None:
    set_config(folder, num_hidden_layers=3)
    [note] = opened(folder).notes
    assert "blocks from 3 on" in note
    assert "model.layers.3.input_layernorm.weight" in note
    require_theirs(folder)


def test_a_bias_of_zeros_changes_nothing_and_any_other_is_refused(folder: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.bias"
    change(folder, {name: torch.zeros(54)})
    assert opened(folder).notes == ()
    change(folder, {name: torch.full((54,), 1e-3)})
    with pytest.raises(UserError, match=rf"hold '{name}', which the llama port does not compute with"):
        opened(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.post_ffn_norm.weight", "model.embed_norm.weight", "layers.0.x.weight"]
)
def test_an_unknown_module_of_the_decoder_is_refused(folder: Path, name: str) -> None:
    change(folder, {name: torch.ones(54)})
    with pytest.raises(UserError, match=rf"hold '{name}'.*another architecture or a modified one"):
        opened(folder)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_a_base_model_saved_alone_gives_the_same_weights(family: str, tmp_path: Path) -> None:
    folder = copied(family, tmp_path / "model")
    prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox.", "llama": "model."}[family]
    tensors = load_file(folder / WHOLE)
    bare = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    save_file(bare, folder / WHOLE, {"format": "pt"})
    whole = {name.removeprefix(prefix): values for name, values in read(tiny_folder(family)).items()}
    found = read(folder)
    assert found.keys() == whole.keys()
    assert all(np.array_equal(values, whole[name]) for name, values in found.items())


def test_the_head_of_gpt_neox_goes_by_either_name(tmp_path: Path) -> None:
    folder = copied("gpt_neox", tmp_path / "model")
    tensors = load_file(folder / WHOLE)
    old, new = (
        ("embed_out.weight", "lm_head.weight")
        if "embed_out.weight" in tensors
        else ("lm_head.weight", "embed_out.weight")
    )
    change(folder, {old: None, new: tensors[old]})
    np.testing.assert_array_equal(read(folder, head=True)[new], tensors[old].numpy())


def test_a_tied_embedding_saved_as_the_head_alone_is_the_embedding(tmp_path: Path) -> None:
    folder = copied("qwen2_tied", tmp_path / "model")
    embedding = load_file(folder / WHOLE)["model.embed_tokens.weight"]
    change(folder, {"model.embed_tokens.weight": None, "lm_head.weight": embedding})
    require_theirs(folder)
    np.testing.assert_array_equal(read(folder, head=True)["model.embed_tokens.weight"], embedding.numpy())


def test_a_head_that_should_be_the_embedding_and_is_not_is_refused_where_it_is_computed(tmp_path: Path) -> None:
    folder = copied("qwen2_tied", tmp_path / "model")
    embedding = load_file(folder / WHOLE)["model.embed_tokens.weight"]
    change(folder, {"lm_head.weight": embedding.clone()})
    opened(folder, head=True)
    change(folder, {"lm_head.weight": embedding + 1})
    opened(folder)
    with pytest.raises(
        UserError, match=r"'lm_head\.weight' .* is not 'model\.embed_tokens\.weight'.*tie_word_embeddings"
    ):
        opened(folder, head=True)


def test_a_whole_file_that_lacks_tensors_is_told_to_count_before_the_pieces(folder: Path) -> None:
    write_pieces(folder, scaled(1))
    change(folder, {"model.norm.weight": None})
    with pytest.raises(
        UserError, match=rf"lack 'model\.norm\.weight'.*{WHOLE} of .* is read.*not the pieces of {INDEX}"
    ):
        opened(folder)


def test_an_adapter_that_is_not_merged_is_told_as_such(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    lora = {f"{name}.lora_A.default.weight": torch.ones(2, 54)}
    change(folder, lora)
    with pytest.raises(UserError, match=r"lora_A\.default\.weight', which .*merge the adapter with PEFT"):
        opened(folder)
    change(folder, {**lora, f"{name}.weight": None, f"{name}.base_layer.weight": torch.ones(54, 54)})
    with pytest.raises(UserError, match=r"hold an adapter that is not merged; merge the adapter with PEFT"):
        opened(folder)


def test_names_of_a_wrapper_are_told_as_such(folder: Path) -> None:
    tensors = load_file(folder / WHOLE)
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, folder / WHOLE, {"format": "pt"})
    with pytest.raises(UserError, match=r"begin with 'module\.'.*save_pretrained"):
        opened(folder)


# --------------------------------------------------------------------------------------- which file counts


def _index_of_an_older_save(folder: Path) -> None:
    write_pieces(folder, scaled(2))


def _index_whose_pieces_are_gone(folder: Path) -> None:
    for path in write_pieces(folder, scaled(2)):
        path.unlink()


def _files_of_other_programs(folder: Path) -> None:
    save_file(scaled(2), folder / "consolidated.safetensors")
    save_file(scaled(3), folder / "model.fp16.safetensors", {"format": "pt"})
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"x")
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _pieces_and_an_index(folder: Path) -> None:
    write_pieces(folder, scaled(2))
    (folder / WHOLE).unlink()


def _pieces_that_overlap(folder: Path) -> None:
    first, *_, last = write_pieces(folder, scaled(2))
    shared = dict(load_file(first))
    save_file({**load_file(last), **{name: tensor * 5 for name, tensor in shared.items()}}, last, {"format": "pt"})
    (folder / WHOLE).unlink()


def _named_by_the_configuration(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "better.safetensors")
    save_file(scaled(2), folder / WHOLE, {"format": "pt"})
    set_config(folder, transformers_weights="better.safetensors")


def _links_into_a_cache(folder: Path) -> None:
    (folder / "blobs").mkdir()
    (folder / WHOLE).rename(folder / "blobs" / "abc")
    (folder / WHOLE).symlink_to("blobs/abc")


LAYOUTS = [
    _index_of_an_older_save,
    _index_whose_pieces_are_gone,
    _files_of_other_programs,
    _pieces_and_an_index,
    _pieces_that_overlap,
    _named_by_the_configuration,
    _links_into_a_cache,
]


@pytest.mark.parametrize("lay_out", LAYOUTS)
def test_the_file_that_transformers_reads_is_the_one_that_counts(lay_out: Callable[[Path], None], folder: Path) -> None:
    lay_out(folder)
    assert len(opened(folder).notes) == (1 if (folder / WHOLE).exists() and (folder / INDEX).exists() else 0)
    require_theirs(folder)


def test_the_reference_of_verify_reads_the_same_file(folder: Path) -> None:
    _index_of_an_older_save(folder)
    theirs = load_theirs(OpenModel.open(str(folder)), 2, torch.float32)
    mine = read(folder)
    for name, values in theirs.state_dict().items():
        np.testing.assert_array_equal(mine[f"model.{name}"], values.numpy(), err_msg=name)


def _variant(folder: Path) -> str:
    (folder / WHOLE).rename(folder / "model.fp16.safetensors")
    return "variant fp16"


def _variant_in_pieces(folder: Path) -> str:
    write_pieces(folder, scaled(1), index="model.safetensors.index.bf16.json")
    (folder / WHOLE).unlink()
    return "variant bf16"


def _pieces_without_an_index(folder: Path) -> str:
    write_pieces(folder, scaled(1), index=None)
    save_file(scaled(2), folder / "consolidated.safetensors")
    (folder / WHOLE).unlink()
    return f"no {INDEX}"


def _another_name(folder: Path) -> str:
    (folder / WHOLE).rename(folder / "weights.safetensors")
    return "weights.safetensors is read in its place"


@pytest.mark.parametrize("lay_out", [_variant, _variant_in_pieces, _pieces_without_an_index, _another_name])
def test_the_only_choice_is_taken_and_told(lay_out: Callable[[Path], str], folder: Path) -> None:
    said = lay_out(folder)
    [note] = opened(folder).notes
    assert said in note
    expected = read(tiny_folder("llama"))
    found = read(folder)
    assert all(np.array_equal(found[name], values) for name, values in expected.items())


def test_an_adapter_beside_the_model_is_told_and_not_merged(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    [note] = opened(folder).notes
    assert re.search(r"adapter.*not merged.*--adapter", note)
    with pytest.raises(ValueError, match="it would merge the adapter"):
        load_theirs(OpenModel.open(str(folder)), 2, torch.float32)


def _no_piece(folder: Path) -> str:
    write_pieces(folder, scaled(2))[1].unlink()
    (folder / WHOLE).unlink()
    return r"index\.json names 'model-00002-of-00003\.safetensors', which is missing from .*download it again"


def _no_piece_and_no_index(folder: Path) -> str:
    write_pieces(folder, scaled(2), index=None)[1].unlink()
    (folder / WHOLE).unlink()
    return r"3 pieces, one of them model-00002-of-00003\.safetensors, which is missing"


def _two_variants(folder: Path) -> str:
    for name in ("fp16", "bf16"):
        shutil.copy(folder / WHOLE, folder / f"model.{name}.safetensors")
    (folder / WHOLE).unlink()
    return r"variants bf16, fp16 .*rename the one"


def _twice(folder: Path) -> str:
    (folder / WHOLE).rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    return r"in two files of .*a\.safetensors and b\.safetensors; keep one"


def _outside_the_folder(folder: Path) -> str:
    (folder / WHOLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    return r"names '\.\./model\.safetensors', which is not a file of that folder"


def _named_and_missing(folder: Path) -> str:
    set_config(folder, transformers_weights="gone.safetensors")
    return r"'gone\.safetensors' as its transformers_weights, which is missing"


def _link_to_nothing(folder: Path) -> str:
    (folder / WHOLE).unlink()
    (folder / WHOLE).symlink_to("../../blobs/abc")
    return r"model\.safetensors is a link to \.\./\.\./blobs/abc, which is not there; download"


def _large_file_storage(folder: Path) -> str:
    (folder / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    return r"^\S+ is a Git LFS pointer in place of the weights; fetch them with git lfs pull$"


def _mistral(folder: Path) -> str:
    (folder / WHOLE).rename(folder / "consolidated.safetensors")
    return r"consolidated\*\.safetensors alone, under Mistral's own names"


def _flax(folder: Path) -> str:
    (folder / WHOLE).rename(folder / "flax_model.msgpack")
    return r"flax_model\.msgpack, of Flax; .*transformers 4: .*from_flax=True"


def _tensorflow(folder: Path) -> str:
    (folder / WHOLE).rename(folder / "tf_model.h5")
    return r"tf_model\.h5, of TensorFlow; .*from_tf=True"


def _meta(folder: Path) -> str:
    (folder / WHOLE).rename(folder / "consolidated.00.pth")
    (folder / "config.json").unlink()
    (folder / "params.json").write_text("{}")
    return r"consolidated\.00\.pth, weights in the form in which Meta releases them.*Hugging Face's form"


def _only_an_adapter(folder: Path) -> str:
    (folder / WHOLE).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return r"holds an adapter; give it as --adapter"


def _folder_of_a_trainer(folder: Path) -> str:
    inner = folder / "checkpoint-500"
    inner.mkdir()
    for name in ("config.json", WHOLE):
        (folder / name).rename(inner / name)
    return r"no config\.json, but models in folders of it \(checkpoint-500\); give one"


def _nothing_at_all(folder: Path) -> str:
    (folder / WHOLE).unlink()
    (folder / "training_args.bin").write_bytes(b"x")
    return r"no \*\.safetensors file in"


@pytest.mark.parametrize(
    "lay_out",
    [
        _no_piece,
        _no_piece_and_no_index,
        _two_variants,
        _twice,
        _outside_the_folder,
        _named_and_missing,
        _link_to_nothing,
        _large_file_storage,
        _mistral,
        _flax,
        _tensorflow,
        _meta,
        _only_an_adapter,
        _folder_of_a_trainer,
        _nothing_at_all,
    ],
)
def test_a_folder_that_cannot_be_read_says_what_it_is(lay_out: Callable[[Path], str], folder: Path) -> None:
    said = lay_out(folder)
    with pytest.raises(UserError, match=said) as error:
        opened(folder)
    assert "\n" not in str(error.value)


def test_a_file_of_a_model_says_which_folder_to_give(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"is one file of a model; give its folder, {folder}"):
        open_checkpoint(str(folder / WHOLE))


# -------------------------------------------------------------------------------------------- *.bin and others


@pytest.fixture
def pickled(tmp_path: Path) -> Iterator[Path]:
    """A model as torch's pickles, in bfloat16 with a mask of bytes, where config.json says another dtype."""
    folder = copied("llama", tmp_path / "a model")
    set_config(folder, dtype="float16")
    yield folder


def run_mend(sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what the command of a sentence does, in this process."""
    found = re.search(r"cd ('[^']+'|\S+) && python -c \"([^\"]+)\"$", sentence)
    assert found, sentence
    monkeypatch.chdir(found[1].strip("'"))
    exec(found[2], {})


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_command_for_pickles_gives_every_tensor_as_it_was_stored(
    pickled: Path, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(pickled / WHOLE).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T  # as torch saves a matrix that is turned
    names = sorted(tensors)
    for number in range(pieces):
        name = "pytorch_model.bin" if pieces == 1 else f"pytorch_model-{number + 1:05d}-of-{pieces:05d}.bin"
        torch.save({name: tensors[name] for name in names[number::pieces]}, pickled / name)
    (pickled / WHOLE).unlink()
    before = {path.name: path.read_bytes() for path in pickled.iterdir()}
    with pytest.raises(UserError, match=r"pickles, which are never opened here; convert them once") as error:
        opened(pickled)
    run_mend(str(error.value), monkeypatch)
    converted = load_file(pickled / WHOLE)
    assert converted.keys() == tensors.keys()
    assert all(t.dtype == tensors[n].dtype and torch.equal(t, tensors[n]) for n, t in converted.items())
    assert {path.name: path.read_bytes() for path in pickled.iterdir() if path.name != WHOLE} == before
    require_theirs(pickled)


def test_an_adapter_of_pickles_gets_its_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{path}.lora_A.weight": torch.ones(2, 54), f"{path}.lora_B.weight": torch.ones(54, 2)}
    torch.save(factors, adapter / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle") as error:
        OpenModel.open(str(folder), adapter=str(adapter))
    run_mend(str(error.value), monkeypatch)
    merged = OpenModel.open(str(folder), adapter=str(adapter)).checkpoint
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(merged.read(name), load_file(folder / WHOLE)[name].numpy() + 2)


# ------------------------------------------------------------------------------------------------- from the hub


def of_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str]) -> dict[str, Any]:
    """A hub with one repository, downloaded to a folder; what it was asked for."""
    asked: dict[str, Any] = {}

    def snapshot(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: names)
    return asked


def test_nothing_is_downloaded_that_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked = of_hub(monkeypatch, folder, [])
    assert open_checkpoint("owner/name").revision == folder.name
    wanted = ["config.json", WHOLE, "model-00001-of-00002.safetensors", INDEX, "tokenizer.model", "merges.txt"]
    wanted += ["chat_template.jinja", "additional_chat_templates/tools.jinja", "adapter_model.safetensors"]
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/params.json", "x.gguf"]
    others += ["pytorch_model.bin", "onnx/config.json", "checkpoint-5/model.safetensors", "tf_model.h5", "x.pth"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == wanted


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.Q4_K_M.gguf", "b.gguf"], r"GGUF files \(2 of them\).*hf download owner/name a\.Q4_K_M\.gguf"),
        (["config.json", "pytorch_model.bin"], r"hf download owner/name --local-dir name && cd name && python -c"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], r"pytorch_model-\*\.bin, pickles"),
        ([], r"owner/name has no config\.json on the hub"),
    ],
)
def test_a_repository_without_safetensors_says_what_it_has(
    names: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_hub(monkeypatch, tmp_path, names)
    if "config.json" in names:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=said):
        open_checkpoint("owner/name")


def test_a_hub_that_does_not_list_its_files_is_no_second_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_hub(monkeypatch, tmp_path, [])
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: 1 / 0)
    assert hub._names_on_hub("owner/name", "main") is None
    with pytest.raises(UserError, match=rf"config\.json is missing from {tmp_path}"):
        open_checkpoint("owner/name")


# ------------------------------------------------------------------------------------------------- a whole run


def test_what_is_passed_over_is_told_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model", layers=2)
    change(model, {"score.weight": torch.ones(2, 32)})
    monkeypatch.setattr(command, "host_budget", lambda *_: 1 / 0)  # far enough
    options: dict[str, Any] = {"model_path": str(model), "tasks_file": str(write_jsonl(tmp_path / "in.jsonl", [5, 9]))}
    config = ExtractConfig(**options, activations_dir=str(tmp_path / "out"), layers_to_extract=(1,))
    with pytest.raises(ZeroDivisionError):
        command.extract_to_directory(config)
    assert re.search(
        r"^note +the weights hold tensors outside the decoder \(score\.weight\)", capsys.readouterr().out, re.M
    )
