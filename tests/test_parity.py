"""Every captured number is the number that the Hugging Face model computes.

Guarded: each family's every hook point at every layer, for texts of mixed lengths behind each other in one row, and
once a port in a padded row each;
the spellings and layouts a checkpoint may have; bfloat16 no worse than Hugging Face's own; real weights
on real text; 8,192 tokens, without an array of tokens x tokens. The truth is the torch model on each
text alone, without padding, in float32. `pytest -rP` prints the worst errors measured.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny_models import (
    CHARACTERS,
    FAMILIES,
    Rows,
    families,
    random_ids,
    reference,
    row_errors,
    run_rows,
    save,
    text_of,
    tiny_folder,
    tiny_model,
)
from transformers import AutoModel, LlamaConfig, LlamaModel

from jax_extract import extract
from jax_extract.extraction import jax_backend
from jax_extract.extraction.capture import capture_plan
from jax_extract.extraction.program import CaptureProgram
from jax_extract.inputs.arc import arc_samples, read_tasks
from jax_extract.weights.gguf import GgufCheckpoint
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from models.attention import causal_attention
from models.capture_plan import PATTERN_TOKENS, CapturePlan
from models.hooks import HOOK_POINTS
from models.layers import LONGEST_SUM, Numerics
from models.packing import Packing
from models.positions import Positions
from models.registry import PORTS, port_for
from models.self_attention import AttentionRule, WithinRows
from models.taps import Taps

# One token; fewer than a key of the shortest window; more than a block of queries; several blocks.
LENGTHS = (1, 3, 40, 150, 300)
SHORT_FAMILIES = tuple(family for family in FAMILIES if family != "long")
PADDED_FAMILIES = ("qwen2_window", "gpt2", "gpt_neox", "phi", "gemma2")  # one a port; two of them have windows
OTHER_FAMILIES = (family for family in SHORT_FAMILIES if family not in PADDED_FAMILIES)
OF_PATTERNS = families(" ".join(PADDED_FAMILIES), " ".join(OTHER_FAMILIES))
LAYOUT_FAMILIES = ("qwen2_window", "qwen3", "llama_llama3_rope", "llama_linear_rope", "mistral")

ENGLISH = (
    "When on board H.M.S. 'Beagle,' as naturalist, I was much struck with certain facts in the distribution of the "
    "inhabitants of South America, and in the geological relations of the present to the past inhabitants of that "
    "continent. These facts seemed to me to throw some light on the origin of species -- that mystery of mysteries, "
    "as it has been called by one of our greatest philosophers. On my return home, it occurred to me, in 1837, that "
    "something might perhaps be made out on this question by patiently accumulating and reflecting on all sorts of "
    "facts which could possibly have any bearing on it."
)


@pytest.fixture(scope="module", autouse=True)
def compiled_as_users_do() -> Iterator[None]:
    """Programs are optimised; conftest.py says why not elsewhere."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


def bound(hook: str) -> float:
    return 1e-5 if HOOK_POINTS[hook].residual_stream else 5e-5


def assert_parity(got: Rows, truth: Rows, what: str) -> dict[str, float]:
    """Every row of every hook point within its bound; the worst error of each hook point."""
    assert set(got) == set(truth), what
    worst: dict[str, float] = {}
    for (hook, layer), rows in truth.items():
        errors = row_errors(got[hook, layer], rows)
        assert errors.max() <= bound(hook), f"{what}: {hook} of layer {layer}, row {errors.argmax()}: {errors.max()}"
        worst[hook] = max(worst.get(hook, 0.0), float(errors.max()))
    return worst


def print_worst(what: str, errors: Sequence[dict[str, float]]) -> None:
    worst = {hook: max(e[hook] for e in errors) for hook in errors[0]}
    print(what, *(f"{hook} {value:.1e}" for hook, value in worst.items()), sep="  ")


def captured_in_one_slab(
    folder: Path,
    sequences: Sequence[np.ndarray],
    dtype: str = "float32",
    packed: bool = False,
    hooks: Sequence[str] = ("*",),
    pattern_tokens: int = PATTERN_TOKENS,
) -> list[Rows]:
    """Hook points at every position of all sequences, computed in one slab with random tokens as padding.

    Each sequence has a row of its own; `packed` puts them one behind the other into a single one.
    """
    model = OpenModel.open(str(folder))
    layers = range(model.config.num_hidden_layers)
    plan = capture_plan(model, layers, hooks, "all", "float32", pattern_tokens)
    weights = Weights(model.checkpoint, model.port, model.config, len(layers))
    numerics = jax_backend.compute_numerics(dtype)
    mesh = jax_backend.open_mesh("1,1")
    program = CaptureProgram(model.port, model.config, weights.load(mesh, numerics.dtype), plan, mesh, numerics)
    rows = [list(sequences)] if packed else [[sequence] for sequence in sequences]
    padded = max(sum(map(len, row)) for row in rows) + 4
    tokens = np.random.default_rng(1).integers(0, CHARACTERS, (len(rows), padded)).astype(np.int32)
    places = []
    for i, row in enumerate(rows):
        ends = list(itertools.accumulate(map(len, row), initial=0))
        tokens[i, : ends[-1]] = np.concatenate(row)
        places += [(i, slice(*place)) for place in itertools.pairwise(ends)]
    captured = program.run(tokens, np.array([[*map(len, row)] for row in rows], np.int32))
    arrays = {hook: np.asarray(array) for hook, array in captured.items()}
    return [
        {(hook, layer): arrays[hook][plan.slot(hook, layer), i, place] for hook, layer in plan.sites()}
        for i, place in places
    ]


def extracted(folder: Path, sequences: Sequence[np.ndarray]) -> list[Rows]:
    """Everything of all sequences, as the notebook call gives it."""
    layers = range(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    run = extract(
        str(folder), [text_of(s) for s in sequences], layers=layers, hook_points=("*",), positions="all", batch_size=4
    )
    return [run_rows(run, str(i)) for i in range(len(sequences))]


def assert_identical(got: Sequence[Rows], wanted: Sequence[Rows]) -> None:
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        assert set(g) == set(w)
        for site, rows in w.items():
            np.testing.assert_array_equal(g[site], rows, err_msg=str(site))


@pytest.mark.parametrize(
    ("family", "packed"),
    [
        *(pytest.param(family, True, id=f"{family}-packed") for family in SHORT_FAMILIES),
        *(pytest.param(family, False, id=f"{family}-padded") for family in PADDED_FAMILIES),
    ],
)
def test_every_hook_point_of_every_layer_is_what_hugging_face_computes(family: str, packed: bool) -> None:
    sequences = random_ids(LENGTHS)
    got = captured_in_one_slab(tiny_folder(family), sequences, packed=packed)
    worst = [
        assert_parity(rows, reference(tiny_model(family), sequence), f"{family}, {len(sequence)} tokens")
        for rows, sequence in zip(got, sequences, strict=True)
    ]
    model = OpenModel.open(str(tiny_folder(family)))
    assert set(worst[0]) == set(model.port.hook_points(model.config)) - {"attention_pattern"}
    print_worst(family, worst)


@pytest.mark.parametrize(
    ("family", "packed"),
    [
        *(pytest.param(family, True, id=f"{family}-packed") for family in OF_PATTERNS),
        *(pytest.param(family, False, id=f"{family}-padded") for family in families("qwen2_window gemma2", "phi gpt2")),
    ],
)
def test_the_attention_pattern_is_hugging_faces_and_attention_with_it_mixes_the_same(family: str, packed: bool) -> None:
    """A row has the weights of a token over its own sample, head by head, and zeros behind them."""
    sequences = random_ids(LENGTHS)
    hooks, most = ("attention_pattern", "attention_heads", "after_block"), 301
    got = captured_in_one_slab(tiny_folder(family), sequences, packed=packed, hooks=hooks, pattern_tokens=most)
    model = tiny_model(family)
    heads = OpenModel.open(str(tiny_folder(family))).config.num_attention_heads
    worst = []
    for rows, sequence in zip(got, sequences, strict=True):
        whole = reference(model, sequence, pattern_tokens=most)
        truth = {site: whole[site] for site in whole if site[0] in hooks}
        worst.append(assert_parity(rows, truth, f"{family}, {len(sequence)} tokens"))
        pattern = rows["attention_pattern", 0].reshape(len(sequence), heads, most)
        np.testing.assert_allclose(pattern.sum(axis=2), 1, rtol=2e-6)
        assert not np.triu(pattern.transpose(1, 0, 2), k=1).any()
    print_worst(family, worst)


def test_a_long_sample_is_divided_into_blocks_of_queries() -> None:
    """The logits of a block are held for all keys of its row, and never those of all queries."""
    tokens, heads, most = 900, 6, 64
    packing = Packing(jnp.full((1, 18), 50, jnp.int32), tokens)
    plan = CapturePlan((("attention_pattern", (0,)),), Positions("all"), pattern_tokens=most)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        taps = Taps.start(plan, 1, packing, {"attention_pattern": heads * most})
        rows = WithinRows(packing.positions)
        mixed, taps, _ = rows.attend_visibly(AttentionRule(), jnp.int32(0), q, k, v, taps, Numerics())
        return mixed, taps.buffers["attention_pattern"]

    assert _largest_square(jax.jit(attention), (1, tokens, heads, 8), (1, tokens, 2, 8), (1, tokens, 2, 8)) < tokens


def test_every_port_is_among_those_of_padded_rows() -> None:
    ports = {id(port_for(FAMILIES[family]().to_dict())) for family in PADDED_FAMILIES}
    assert ports == {id(port) for port in PORTS.values()}


def test_the_last_after_block_is_not_the_final_norm() -> None:
    [rows] = captured_in_one_slab(tiny_folder("qwen2"), random_ids([20]))
    assert row_errors(rows["after_block", 3], rows["final_norm", None]).min() > 0.1


def test_the_families_differ_where_they_should() -> None:
    """The reference itself sees windows, rope scaling and biases: otherwise parity would prove nothing."""
    [sequence] = random_ids([60])
    for family, changes in (
        ("qwen2_window", {"sliding_window": 500}),
        ("mistral", {"sliding_window": None}),
        ("llama_llama3_rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("llama_linear_rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}),
    ):
        model = tiny_model(family)
        config = copy.deepcopy(model.config)
        for name, value in changes.items():
            setattr(config, name, value)
        other = AutoModel.from_config(config, attn_implementation="eager").eval()
        other.load_state_dict(model.base_model.state_dict())
        site = ("after_block", model.config.num_hidden_layers - 1)
        assert row_errors(reference(other, sequence)[site], reference(model, sequence)[site]).max() > 1e-3, family
    for family in ("qwen2", "llama_biases"):
        biases = [v for k, v in tiny_model(family).named_parameters() if k.endswith("bias")]
        assert biases and all(v.abs().max() > 0.1 for v in biases), family


@pytest.mark.parametrize("family", LAYOUT_FAMILIES)
def test_both_spellings_of_config_json_are_one_configuration(family: str, tmp_path: Path) -> None:
    folder = tiny_folder(family)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)  # transformers 4 wrote `use_sliding_window` and `max_window_layers` alone
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = (OpenModel.open(str(place)) for place in (tmp_path, folder))
    assert ours.port is theirs.port and ours.config == theirs.config  # of which the forward is a function


def _base_model_only(folder: Path) -> None:
    save(tiny_model("qwen2_window").base_model, folder)
    assert _tensor_names(folder).isdisjoint({"model.norm.weight", "lm_head.weight"})


def _several_shards(folder: Path) -> None:
    save(tiny_model("qwen2_window"), folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert (folder / "model.safetensors.index.json").exists()


def _tensor_names(folder: Path) -> frozenset[str]:
    return OpenModel.open(str(folder)).checkpoint.names()


@pytest.mark.parametrize("write", [_base_model_only, _several_shards])
def test_a_checkpoint_gives_the_same_rows_however_it_is_laid_out(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    sequences = random_ids([1, 50])
    assert_identical(extracted(tmp_path, sequences), extracted(tiny_folder("qwen2_window"), sequences))


def test_a_tied_checkpoint_without_a_head_loads_and_is_right() -> None:
    assert "lm_head.weight" not in _tensor_names(tiny_folder("qwen2_tied"))
    assert "lm_head.weight" in _tensor_names(tiny_folder("qwen2"))
    sequences = random_ids([1, 50])
    for rows, sequence in zip(extracted(tiny_folder("qwen2_tied"), sequences), sequences, strict=True):
        assert_parity(rows, reference(tiny_model("qwen2_tied"), sequence), "qwen2_tied")


def test_the_names_of_transformers_5_are_found_in_a_model_that_reads_pictures(tmp_path: Path) -> None:
    folder = tiny_folder("gemma3_with_pictures")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in tensors)
    renamed = {name.replace("language_model.model.", "model.language_model."): t for name, t in tensors.items()}
    safetensors.numpy.save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    options = {"layers": (0, 5), "hook_points": ("*",), "positions": "all"}
    texts = [text_of(sequence) for sequence in random_ids([1, 50])]
    runs = [extract(str(place), texts, **options) for place in (tmp_path, folder)]
    assert_identical(*([run_rows(run, str(i)) for i in range(2)] for run in runs))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama_biases", "mistral"])
def test_bfloat16_is_no_further_from_float32_than_hugging_face_in_bfloat16(family: str) -> None:
    sequences = random_ids(LENGTHS)
    model = tiny_model(family)
    theirs_model = copy.deepcopy(model).bfloat16()
    # Casting the model casts the rotary frequencies' buffer too, which loading in bfloat16 does not do.
    theirs_model.base_model.rotary_emb = copy.deepcopy(model.base_model.rotary_emb)
    ours: list[list[np.ndarray]] = []
    theirs: list[list[np.ndarray]] = []
    for rows, sequence in zip(captured_in_one_slab(tiny_folder(family), sequences, "bfloat16"), sequences, strict=True):
        truth, half = reference(model, sequence), reference(theirs_model, sequence)
        sites = [("after_block", layer) for layer in range(model.config.num_hidden_layers)]
        ours.append([row_errors(rows[site], truth[site]) for site in sites])
        theirs.append([row_errors(half[site], truth[site]) for site in sites])
    for layer in range(model.config.num_hidden_layers):
        mine = np.concatenate([errors[layer] for errors in ours])
        hers = np.concatenate([errors[layer] for errors in theirs])
        print(f"{family} layer {layer}: median {np.median(mine):.1e} against {np.median(hers):.1e}, ", end="")
        print(f"worst {mine.max():.1e} against {hers.max():.1e}")
        assert 0 < np.median(mine) <= np.median(hers), (family, layer)
        assert mine.max() <= hers.max(), (family, layer)


def test_smollm2_real_weights_on_english_and_an_arc_prompt(smollm2_gguf: Path, arc_tasks: Path) -> None:
    layers = (0, 10, 23, 29)
    prompt = next(iter(arc_samples(read_tasks(arc_tasks), n_tasks=1))).text
    run = extract(
        str(smollm2_gguf),
        {"english": ENGLISH, "arc": prompt},
        layers=layers,
        hook_points=("*",),
        positions="all",
        max_seq_length=140,
    )
    assert 220 <= run.metadata["total_tokens"] <= 280
    checkpoint = GgufCheckpoint(smollm2_gguf)
    config = LlamaConfig(**{**checkpoint.config, "attn_implementation": "eager"})
    with torch.device("meta"):
        model = LlamaModel(config).eval()
    tensors = {n.removeprefix("model."): torch.from_numpy(checkpoint.read(n)) for n in checkpoint.names()}
    model.load_state_dict(tensors, assign=True)
    model.rotary_emb = type(model.rotary_emb)(config)  # not in the checkpoint, so still on `meta`
    worst = [
        assert_parity(run_rows(run, name), reference(model, run.sample(name).token_ids, layers), f"SmolLM2, {name}")
        for name in ("english", "arc")
    ]
    print_worst("SmolLM2-135M", worst)


@pytest.mark.parametrize("terms", [1, 3, 4, 9, 10])
def test_a_sum_in_parts_has_every_term_once(terms: int) -> None:
    draw = np.random.default_rng(0)
    x, weight, bias = (draw.integers(-9, 9, shape).astype(np.float32) for shape in ((2, 5, 9), (4, 9), (4,)))
    summed = Numerics(longest_sum=terms).long_linear(*map(jnp.asarray, (x, weight, bias)))
    assert np.array_equal(summed, x @ weight.T + bias)


def test_an_extraction_divides_the_sums_of_the_last_product_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Rows:
        return extracted(tiny_folder("qwen2_tied"), [random_ids([40])[0]])[0]

    divided = rows()
    monkeypatch.setattr(jax_backend, "LONGEST_SUM", 5)
    otherwise = rows()
    same = {hook for hook, layer in divided if layer == 0 and np.array_equal(divided[hook, 0], otherwise[hook, 0])}
    assert {"attention_out", "after_attention", "ffn_gate", "ffn_up", "ffn_hidden"} <= same
    assert not {"ffn_out", "after_block"} & same


def test_a_sum_with_one_massive_term_is_exact() -> None:
    draw = np.random.default_rng(0)
    x, weight = (draw.standard_normal(shape, np.float32) for shape in ((1, 64, 3_072), (256, 3_072)))
    x[0, :, 5], weight[:, 5] = 100.0, 1.0
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)

    def error(numerics: Numerics) -> float:
        return float(np.linalg.norm(jax.jit(numerics.long_linear)(x, weight) - exact) / np.linalg.norm(exact))

    # Undivided: 1.05e-6 where a processor has one accumulator.
    assert error(Numerics(longest_sum=LONGEST_SUM)) < 6e-7


def test_8192_tokens_are_what_hugging_face_computes() -> None:
    sequence = random_ids([8_192])
    [got] = extracted(tiny_folder("long"), sequence)
    model = copy.deepcopy(tiny_model("long"))
    model.set_attn_implementation("sdpa")
    assert got["after_block", 1].shape == (8_192, 36)
    print_worst("8,192 tokens", [assert_parity(got, reference(model, sequence[0]), "8,192 tokens")])


def _avals(jaxpr: Jaxpr) -> Iterator[tuple[int, ...]]:
    """Shapes of every intermediate, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(value, ClosedJaxpr):
                yield from _avals(value.jaxpr)
            elif isinstance(value, Jaxpr):
                yield from _avals(value)


def _largest_square(function: Callable[..., Any], *shapes: tuple[int, ...]) -> int:
    """The second longest axis of the intermediate where it is longest."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return max(sorted(shape)[-2] for shape in _avals(jaxpr) if len(shape) > 1)


@pytest.mark.parametrize("window", [None, 4_096])
def test_attention_over_8192_tokens_holds_no_array_of_tokens_by_tokens(window: int | None) -> None:
    query, key = (2, 8_192, 6, 8), (2, 8_192, 2, 8)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        reach = jnp.broadcast_to(jnp.arange(8_192, dtype=jnp.int32), (2, 8_192))
        return causal_attention(
            q, k, v, reach=reach if window is None else jnp.minimum(reach, window - 1), numerics=Numerics()
        )

    def dense(q: jax.Array, k: jax.Array) -> jax.Array:
        return jax.nn.softmax(jnp.einsum("bqgh,bkgh->bgqk", q[:, :, :2], k), axis=-1)

    assert _largest_square(jax.jit(dense), query, key) == 8_192, "the inspection must find what it looks for"
    assert _largest_square(jax.jit(attention), query, key, key) < 8_192
