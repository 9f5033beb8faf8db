"""An edit changes what Hugging Face with an equivalent forward hook changes, and nothing else.

Guarded: every kind of change at every hook point of every family, in one padded and in packed batches, on one device
and on a mesh; several that act on one another; named samples and positions; that what does not exist is refused by name
before anything runs; and that another layer, position or value compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from tiny_models import families, random_ids, row_errors, run_rows, tiny_folder, tiny_model
from torch_hooks import TorchChange, truth_of

from jax_extract import Edit, Model, UserError, load_model, logit_difference
from jax_extract.forward.edits import Edits
from models.capture_plan import PATTERN_TOKENS
from models.hooks import HOOK_POINTS
from models.ports import hook_width

LENGTHS = (23, 9, 40)
LOGITS_BOUND = 2e-5
SCALE = 3.0


def doubled(rows: Any, operand: Any) -> Any:
    """A change of one's own: it depends on the rows, and on an operand with structure."""
    return rows * operand["factor"] + operand["bias"]


KINDS = ("zero", "add", "mean", "replace", "rows", "patch", doubled)


# Every architecture, and every way in which blocks are put together; what else differs is held by parity.
EDITED = families("qwen2_window gpt2 gpt_neox phi gemma2", "qwen3 llama mistral gpt_neox_sequential gemma gemma3")


@pytest.fixture(scope="module", params=EDITED)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def bound(hook: str) -> float:
    return 1e-5 if HOOK_POINTS[hook].residual_stream else 5e-5


def width_of(model: Model, hook: str) -> int:
    return hook_width(model.config, hook)


class Case:
    """One change at one hook point, as an edit of a sample and as torch's hook."""

    def __init__(self, model: Model, hook: str, kind: Any, layer: int | None, sample: int, source: Any) -> None:
        random = np.random.default_rng(sample)
        vector = random.standard_normal(width_of(model, hook)).astype(np.float32)
        at = [2, -1]
        here: dict[str, Any] = {"layer": layer, "samples": sample}
        t = torch.from_numpy
        self.where = (hook, layer)
        if kind == "zero":
            self.edit, change = Edit(hook, "zero", **here), torch.zeros_like
        elif kind == "add":
            # What is added to all keys alike adds the same to all logits of a query, which softmax does not see.
            some = at if hook in ("key", "key_rotated") else None
            self.edit = Edit(hook, "add", value=vector, scale=SCALE, positions=some, **here)
            change = lambda x: at_positions(some or [*range(len(x))], x[some or slice(None)] + t(vector) * SCALE)(x)  # noqa: E731
        elif kind == "mean":
            given = random.standard_normal((7, len(vector))).astype(np.float32)
            self.edit = Edit(hook, "mean", value=given, **here)
            change = lambda x: t(given.mean(axis=0)).expand_as(x).clone()  # noqa: E731
        elif kind == "replace":
            self.edit = Edit(hook, "replace", value=vector, positions=at, **here)
            change = at_positions(at, t(vector))
        elif kind == "rows":
            given = random.standard_normal((2, len(vector))).astype(np.float32)
            self.edit = Edit(hook, "replace", value=given, positions=at, **here)
            change = at_positions(at, t(given))
        elif kind == "patch":
            self.edit = Edit(hook, "patch", positions=at, source=source, **here)
            change = at_positions(at, t(source.sample("source").get(layer, hook)[at].copy()))
        else:
            operand = {"factor": 2.0, "bias": vector}
            self.edit = Edit(hook, kind, value=operand, **here)
            change = lambda x: x * 2.0 + t(vector)  # noqa: E731
        self.change = TorchChange(hook, layer, change)


def at_positions(positions: list[int], rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[positions] = rows
        return x

    return change


def everything(model: Model) -> dict[str, Any]:
    """But the pattern, which has another way of computing attention."""
    kept = [hook for hook in model.hook_points if hook != "attention_pattern"]
    return {hook: "all" if HOOK_POINTS[hook].per_layer else None for hook in kept}


def require_equal(out: Any, sample: int, truth: Any, what: str) -> None:
    rows, logits = truth
    got = run_rows(out.run, str(sample))
    for (name, layer), expected in rows.items():
        worst = row_errors(got[name, layer], expected).max()
        assert worst <= bound(name), f"{what}: {name} of layer {layer} is off by {worst}"
    assert row_errors(out.logits[sample], logits).max() <= LOGITS_BOUND, f"{what}: logits"


@pytest.fixture(scope="module")
def model(family: str) -> Model:
    return load_model(tiny_folder(family), mesh_shape="1,1")


def cases_of(model: Model, source: Any) -> list[Case]:
    layers = model.config.num_hidden_layers
    found: list[Case] = []
    for hook in everything(model):
        for kind in KINDS:
            layer = len(found) % layers if HOOK_POINTS[hook].per_layer else None
            found.append(Case(model, hook, kind, layer, len(found), source))
    return found


def test_every_change_at_every_hook_point_is_hugging_faces_with_such_a_hook(family: str, model: Model) -> None:
    """One program: every sample has an edit of its own, so that samples are kept apart too."""
    torch_model = tiny_model(family)
    [other] = random_ids([31], seed=5)
    source = model.run({"source": other}, capture=everything(model)).run
    cases = cases_of(model, source)
    three = random_ids(LENGTHS, seed=3)
    plain = [truth_of(torch_model, text, [])[1] for text in three]
    texts = [three[i % len(three)] for i in range(len(cases))]
    out = model.run(texts, capture=everything(model), edits=[case.edit for case in cases], logits="all")
    for i, (case, text) in enumerate(zip(cases, texts, strict=True)):
        truth = truth_of(torch_model, text, [case.change])
        require_equal(out, i, truth, repr(case.edit))
        assert row_errors(truth[1], plain[i % len(three)]).max() > 10 * LOGITS_BOUND, f"{case.edit!r} must act"


# One of each kind of block and attention: what does not depend on the architecture is shown of these.
SOME = ("qwen2_window", "gpt_neox", "gemma2")


@pytest.mark.parametrize("name", [*SOME, "gpt2_variant"])
def test_changes_of_the_attention_pattern_mix_other_values(name: str) -> None:
    """A row has the weights of each head; what a token does not see has none, whatever is put there."""
    model = load_model(tiny_folder(name), mesh_shape="1,1")
    kept = {"attention_pattern": "all", "attention_heads": "all", "after_block": "all"}
    [other] = random_ids([31], seed=5)
    source = model.run({"source": other}, capture=kept).run
    layers = model.config.num_hidden_layers
    cases = [Case(model, "attention_pattern", kind, i % layers, i, source) for i, kind in enumerate(KINDS)]
    texts = random_ids([LENGTHS[i % len(LENGTHS)] for i in range(len(cases))], seed=3)
    out = model.run(texts, capture=kept, edits=[case.edit for case in cases], logits="all")
    for i, (case, text) in enumerate(zip(cases, texts, strict=True)):
        rows, logits = truth_of(tiny_model(name), text, [case.change], PATTERN_TOKENS)
        require_equal(out, i, ({site: rows[site] for site in rows if site[0] in kept}, logits), repr(case.edit))
        plain = truth_of(tiny_model(name), text, [])
        assert row_errors(logits, plain[1]).max() > 10 * LOGITS_BOUND, f"{case.edit!r} must act"


def composed(model: Model) -> list[tuple[list[Edit], list[TorchChange]]]:
    """Compositions of two and three, at one hook point and across layers, given in any order of depth."""
    random = np.random.default_rng(8)
    v, w = (random.standard_normal(model.config.hidden_size).astype(np.float32) for _ in range(2))
    t = torch.from_numpy
    add, zero = TorchChange("after_block", 1, lambda x: x + t(v)), TorchChange("after_block", 1, at_zero)
    put = TorchChange("ffn_out", 2, at_positions([3], t(w)))
    scaled = TorchChange("attention_out", 0, lambda x: x * 2.0 + t(w))
    own = Edit("attention_out", doubled, layer=0, value={"factor": 2.0, "bias": w})
    added, zeroed = (
        Edit("after_block", "add", layer=1, value=v),
        Edit("after_block", "zero", layer=1, positions=[4, -2]),
    )
    replaced = Edit("ffn_out", "replace", layer=2, value=w, positions=3)
    return [
        ([added, zeroed], [add, zero]),
        ([zeroed, added], [zero, add]),
        ([replaced, added, own], [scaled, add, put]),
    ]


def at_zero(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[[4, -2]] = 0
    return x


def test_a_text_longer_than_a_row_of_the_pattern_is_refused_and_mixed_as_before_beside_others() -> None:
    model = load_model(tiny_folder("long"), mesh_shape="1,1")
    texts = random_ids([600, 20])
    edit, said = Edit("attention_pattern", "zero", layer=0), r"sample '0' (has )?600 tokens"
    with pytest.raises(UserError, match=said):
        model.run(texts, edits=[edit], logits="last")
    with pytest.raises(UserError, match=said):
        model.run_edits(texts, [edit], logit_difference(1, 2))
    with pytest.raises(UserError, match=said):
        model.run(texts, capture={"attention_pattern": 0})
    one = Edit("attention_pattern", "zero", layer=0, samples="1")
    edited, plain = (model.run(texts, capture={"after_block": 1}, edits=edits).run for edits in ([one], []))
    errors = [row_errors(edited.sample(name).get(1), plain.sample(name).get(1)).max() for name in ("0", "1")]
    assert errors[0] < 1e-5 and errors[1] > 1e-2


@pytest.mark.parametrize("name", SOME)
def test_edits_act_in_the_order_of_the_forward_and_at_one_hook_point_in_that_given(name: str) -> None:
    model = load_model(tiny_folder(name), mesh_shape="1,1")
    [text] = random_ids([19])
    for edits, changes in composed(model):
        out = model.run(text, capture=everything(model), edits=edits, logits="all")
        require_equal(out, 0, truth_of(tiny_model(name), text, changes), repr(edits))


def mixing(rows: Any, _: Any) -> Any:
    return rows - rows.mean(axis=0)


def test_a_function_is_given_each_token_by_itself() -> None:
    """What mixes rows mixes one with itself: company and padding change nothing."""
    model = load_model(tiny_folder("llama"), mesh_shape="1,1")
    short, long = random_ids([7, 30])
    edit = Edit("ffn_out", mixing, layer=1)
    zero = model.run(short, edits=[Edit("ffn_out", "zero", layer=1)], logits="all").logits[0]
    for texts in ([short], [short, long]):
        assert row_errors(model.run(texts, edits=[edit], logits="all").logits[0], zero).max() <= 1e-6


def test_a_live_model_of_transformers_is_used_as_it_is_now() -> None:
    [text] = random_ids([13])
    live = load_model(tiny_model("llama"), mesh_shape="1,1")
    saved = load_model(tiny_folder("llama"), mesh_shape="1,1")
    np.testing.assert_array_equal(live.run(text, logits="all").logits[0], saved.run(text, logits="all").logits[0])
    with pytest.raises(UserError, match="not the loaded model"):
        load_model(tiny_model("llama"), backend="torch")


REFUSED: list[tuple[Callable[[], Edit], str]] = [
    (lambda: Edit("ffn_oout", "zero", layer=1), "nearest name is 'ffn_out'"),
    (lambda: Edit("blocks.1.hook_banana", "zero"), "unknown hook point"),
    (lambda: Edit("ffn_*", "zero", layer=1), "name one hook point"),
    (lambda: Edit("ffn_out", "erase", layer=1), "unknown change 'erase'"),
    (lambda: Edit("ffn_out", "zero"), "needs layer="),
    (lambda: Edit("ffn_out", "zero", layer=5), "layer 5 does not exist; the model has layers 0 to 4"),
    (lambda: Edit("ffn_out", "zero", layer=-6), "layer -6 does not exist"),
    (lambda: Edit("ffn_out", "zero", layer="three"), "'three' names no layer"),
    (lambda: Edit("ffn_out", "zero", layer=[]), "names no layer"),
    (lambda: Edit("blocks.1.hook_mlp_out", "zero", layer=2), "names two layers"),
    (lambda: Edit("final_norm", "zero", layer=1), "has none"),
    (
        lambda: Edit("ffn_out", "zero", layer=1, positions=23),
        "names position 23, and sample '0' has the positions 0 to 22",
    ),
    (lambda: Edit("ffn_out", "zero", layer=1, positions=[-24]), "names position -24"),
    (lambda: Edit("ffn_out", "zero", layer=1, positions=[22, -1]), "twice"),
    (lambda: Edit("ffn_out", "zero", layer=1, samples="other"), "names sample 'other', which is not there"),
    (lambda: Edit("ffn_out", "zero", layer=1, samples=1), "names sample 1"),
    (lambda: Edit("ffn_out", "zero", layer=1, value=[1.0]), "takes neither value nor source"),
    (lambda: Edit("ffn_out", "add", layer=1), "needs value="),
    (lambda: Edit("ffn_out", "patch", layer=1), "needs source="),
    (lambda: Edit("ffn_out", "mean", layer=1), "needs value="),
    (lambda: Edit("ffn_out", "patch", layer=1, source="runs/usual"), "is no run: 'runs/usual'"),  # type: ignore[arg-type]
    (lambda: Edit("ffn_out", "replace", layer=1, value=np.zeros(54), scale=2.0), "takes no scale"),
    (lambda: Edit("ffn_out", "replace", layer=1, value=np.zeros(53)), "53 wide; 'ffn_out' of this model is 54 wide"),
    (
        lambda: Edit("ffn_out", "replace", layer=1, value=np.zeros((3, 54)), positions=[0, 1]),
        "3 rows for the 2 positions",
    ),
    (lambda: Edit("ffn_out", "replace", layer=1, value="words"), "no array of numbers"),
    (lambda: Edit("ffn_out", "replace", layer=1, value=np.full(54, np.nan)), "not finite"),
    (lambda: Edit("ffn_out", lambda rows, _: rows[:, :3], layer=1), "return rows alike"),
    (lambda: Edit("after_block", "zero", layer=3), "changes nothing that is kept"),
    (lambda: Edit("ffn_out", lambda rows: rows, layer=1), "must take rows and an operand"),
    (lambda: Edit("ffn_out", doubled, layer=1, scale=2.0), "takes neither scale nor source"),
    (lambda: Edit("ffn_out", lambda rows, _: rows + 1j, layer=1), "return rows alike"),
    (lambda: Edit("ffn_out", doubled, layer=1, value={"factor": "two", "bias": 0.0}), "give arrays and numbers"),
    (lambda: Edit("ffn_out", doubled, layer=1, value={"factor": 2**40, "bias": 0.0}), "32 bits"),
    (lambda: Edit("ffn_out", "zero", layer=1, samples=[]), "name none"),
    (lambda: Edit("ffn_out", "zero", layer=1, samples=3.5), "must be ids, or places"),  # type: ignore[arg-type]
    (lambda: Edit("ffn_out", "add", layer=1, value=np.ones(54), scale=1e300), "larger than float32 holds"),
    (lambda: Edit("ffn_out", "add", layer=1, value=np.ones(54), scale=10**400), "expected a finite number"),
    (lambda: Edit("ffn_out", "replace", layer=1, value=np.ones(54) * 1j), "no array of numbers"),
    (lambda: Edit("ffn_out", "replace", layer=1, value=["1"] * 54), "no array of numbers"),
    (lambda: Edit("ffn_out", np.zeros(3), layer=1), "unknown change"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_does_not_exist_is_refused_by_name(make: Callable[[], Edit], said: str, refusing: Model) -> None:
    [text] = random_ids([23])
    with pytest.raises(UserError) as refusal:
        refusing.run(text, capture={"after_block": [2]}, edits=[make()])
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def refusing() -> Model:
    return load_model(tiny_folder("qwen2_window"), mesh_shape="1,1")


def test_a_hook_point_that_an_architecture_lacks_is_refused_with_the_reason() -> None:
    model = load_model(tiny_folder("gpt_neox"), mesh_shape="1,1")
    with pytest.raises(UserError, match="there is none between them"):
        model.run([[1, 2]], edits=[Edit("after_attention", "zero", layer=1)], logits="last")


def test_a_source_that_lacks_the_rows_is_refused_by_name(refusing: Model) -> None:
    short, long = random_ids([9, 23])
    last = refusing.run({"0": short}, capture={"after_block": [1]}, positions="last").run
    whole = refusing.run({"a": short, "b": long}, capture={"after_block": [1]}).run
    mean = refusing.run({"0": short}, capture={"after_block": [1]}, positions="mean").run
    wide = load_model(tiny_folder("long"), mesh_shape="1,1").run({"0": long}, capture={"after_block": [1]}).run
    for source, positions, layer, said in (
        (last, [0], 1, "holds no row of position 0 of sample '0'"),
        (last, None, 1, "name the positions"),
        (whole, [0], 1, "no sample '0'"),
        (last, [-1], 2, "no layer 2"),
        (wide, None, 1, "36 wide; 'after_block' of this model is 54 wide"),
        (mean, [-10], 1, "names position -10, and sample '0' of its source has the positions 0 to 8"),
    ):
        with pytest.raises(UserError) as refusal:
            edit = Edit("after_block", "patch", layer=layer, source=source, positions=positions)
            refusing.run({"0": long}, edits=[edit], logits="last")
        assert said in str(refusal.value)


def test_a_source_counts_positions_from_its_own_end_and_gives_a_mean_of_its_rows(refusing: Model) -> None:
    short, long = random_ids([9, 23])
    source = refusing.run({"other": short}, capture={"ffn_out": [1, 2]}).run
    capture = {"ffn_out": [1, 2]}
    last = refusing.run(long, capture=capture, edits=[Edit("ffn_out", "patch", layer=2, source=source, positions=-1)])
    rows = source.sample("other").get(2, "ffn_out")
    np.testing.assert_array_equal(last.run.sample("0").get(2, "ffn_out")[-1], rows[-1])
    mean = refusing.run(long, capture=capture, edits=[Edit("ffn_out", "mean", layer=[1, 2], source=source)])
    for layer in (1, 2):
        expected = source.sample("other").get(layer, "ffn_out").mean(axis=0, dtype=np.float64).astype(np.float32)
        got = mean.run.sample("0").get(layer, "ffn_out")
        np.testing.assert_array_equal(got, np.broadcast_to(expected, got.shape))


def test_edits_are_known_by_the_rows_of_their_source(refusing: Model) -> None:
    """So that a run begun with those of one source does not go on with those of another."""
    [text] = random_ids([9])
    once, again, other = (
        refusing.run(text, capture={"after_block": [1]}, edits=edits).run
        for edits in ([], [], [Edit("ffn_out", "zero", layer=0)])
    )
    digests = [
        Edits.of(Edit("after_block", "patch", layer=1, source=source, positions=[-1]), refusing._opened).digest
        for source in (once, again, other)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_another_layer_position_sample_or_value_compiles_nothing(refusing: Model) -> None:
    texts = random_ids([12, 7, 9])
    random = np.random.default_rng(0)

    def run(layer: int, position: int, sample: int) -> None:
        value = random.standard_normal(54)
        edit = Edit("after_block", "add", layer=layer, value=value, positions=position, samples=sample)
        refusing.run(texts, edits=[edit], logits="last")

    run(1, 0, 0)
    compiled = []
    listen = lambda event, *_, **__: compiled.append(event) if "compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(3, -1, 1)
        run(0, 2, 2)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled, "it must be the same program"


def test_the_logit_lens_is_the_models_own_norm_and_head(family: str, model: Model) -> None:
    [text] = random_ids([11], seed=6)
    last = model.config.num_hidden_layers - 1
    out = model.run(text, capture={"after_block": [last]}, logits="all")
    assert row_errors(model.logits_of(out.run.sample("0").get(last)), out.logits[0]).max() <= LOGITS_BOUND
    with pytest.raises(UserError, match="expected"):
        model.logits_of(np.zeros((2, 3)))


def test_log_probabilities_of_answers_are_hugging_faces(family: str, model: Model) -> None:
    torch_model = tiny_model(family)
    texts, answers = random_ids([12, 30, 5], seed=1), random_ids([3, 1, 17], seed=2)
    out = model.run(texts, answers=answers)
    for text, answer, got in zip(texts, answers, out.answers, strict=True):
        both = np.concatenate([text, answer]).astype(np.int64)
        with torch.inference_mode():
            logits = torch_model(torch.from_numpy(both)[None], use_cache=False).logits[0].float()
        expected = torch.log_softmax(logits[len(text) - 1 : -1], -1)[range(len(answer)), answer.tolist()].numpy()
        np.testing.assert_allclose(got.log_probabilities, expected, atol=1e-4)
        assert abs(got.log_probability - expected.sum()) <= 1e-4 * len(answer)
