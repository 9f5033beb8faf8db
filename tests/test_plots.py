"""`jax-extract plot`: every picture holds what NumPy and the model say of the rows; what cannot be drawn is refused.

Guarded: norms, with the first token apart; variance spectrum and components, without it; colours by token, position and
field; the logit lens; loss and entropy; the map of nodes; how many rows are read; the files, their bytes, and that a
run with pictures in it is the run that it was.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from small_run import ROOT, make_model, run_here, snapshot, whole_lines
from stage02 import SILENT, make_walks, trained, write_preset
from transformers import AutoTokenizer

from jax_extract import Run, load_model, open_activations
from jax_extract.cli import main
from jax_extract.errors import UserError
from jax_extract.plotting.colouring import MOST_GROUPS, Colouring
from jax_extract.plotting.command import plot
from jax_extract.plotting.components import Components
from jax_extract.plotting.config import PlotConfig
from jax_extract.plotting.lens import Lens, draw_lens, following
from jax_extract.plotting.of_run import RunPictures
from jax_extract.plotting.of_training import StagePictures, StagePlace
from jax_extract.plotting.pictures import Drawn, LeftOut
from jax_extract.plotting.reading import SampledRows
from jax_extract.plotting.style import COLOURS, label_text, token_text
from jax_extract.representations.command import token_representations
from jax_extract.representations.config import RepresentationsConfig
from jax_extract.store.token_text import token_texts
from jax_extract.training.checkpoints import read_state
from jax_extract.walks.saved import KIND

LAYERS, SAMPLES = 4, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny", layers=LAYERS)


def written(model: Path, folder: Path, **options: Any) -> Path:
    """A run of texts of 1 to 34 tokens, with two fields."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"s{i}",
            "text": "some words, and $5 more!! "[: 1 + 3 * i] * (1 + i % 2),
            "label": "ab"[i % 2],
            "size": i,
        }
        for i in range(SAMPLES)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen: dict[str, Any] = {"positions": "all", "layers_to_extract": ("all",), "batch_size": 4, **options}
    run_here(model, folder / "texts.jsonl", folder / "run", **chosen)
    return folder / "run"


@pytest.fixture(scope="module")
def place(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    hooks = ("embeddings", "after_block")
    return written(model, tmp_path_factory.mktemp("all"), hook_points=hooks)


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return open_activations(place)


@pytest.fixture(scope="module")
def means(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(model, tmp_path_factory.mktemp("mean"), positions="mean")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a training beside it, and its token representations in it."""
    root = tmp_path_factory.mktemp("stage")
    make_walks(root / "dataset")
    trained(write_preset(root / "preset.json"), root / "dataset", root / "run", logging_steps=1, eval_steps=2)
    token_representations(
        RepresentationsConfig(
            model_path=str(root / "run" / "final_model"),
            representation_dir=str(root / "run" / "token_representations"),
            dataset_dir=str(root / "dataset"),
        ),
        SILENT,
    )
    return root


def drawn(run: Run, place: Path, **options: Any) -> dict[str, Figure]:
    found = RunPictures(run, PlotConfig(str(place), **options), SILENT).draw()
    return {each.name: each.figure for each in found if isinstance(each, Drawn)}


def all_rows(run: Run, layer: int) -> np.ndarray:
    return run.get(layer=layer).astype(np.float64)


def lines(axes: Any) -> dict[str, np.ndarray]:
    """Label -> [2, points]."""
    return {str(line.get_label()): np.array(line.get_data()) for line in axes.lines}


def same_up_to_signs(found: np.ndarray, expected: np.ndarray) -> None:
    for mine, true in zip(found.T, expected.T, strict=True):
        np.testing.assert_allclose(mine * np.sign(mine @ true), true, atol=1e-4 * np.abs(true).max())


# -------------------------------------------------------------------------------------------------- of a run


def test_norms_are_those_of_the_rows_and_the_first_token_is_apart(run: Run, place: Path) -> None:
    figure = drawn(run, place, pictures=("norms",), hook_points=("after_block",))["norms_after_block"]
    left, right, *_ = figure.axes
    first, positions = run.rows.positions == 0, run.rows.positions
    norms = np.array([np.linalg.norm(all_rows(run, layer), axis=1) for layer in range(LAYERS)])
    shown = lines(right)
    np.testing.assert_allclose(
        shown["first token (position 0), median"][1], np.median(norms[:, first], axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(shown["all other tokens, median"][1], np.median(norms[:, ~first], axis=1), rtol=1e-5)
    np.testing.assert_allclose(shown["mean of all rows, the first tokens too"][1], norms.mean(axis=1), rtol=1e-5)
    band = right.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(band[:, 1].max(), np.quantile(norms[:, ~first], 0.99, axis=1).max(), rtol=1e-5)
    [mesh] = left.collections
    table = np.asarray(mesh.get_array())
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges[0] == 1 and edges[-1] == positions.max() + 1
    for column in (0, 7, len(edges) - 2):
        there = (positions >= edges[column]) & (positions < edges[column + 1])
        np.testing.assert_allclose(table[:, column], np.median(norms[:, there], axis=1), rtol=1e-5)
    said = " ".join(text.get_text() for text in figure.texts)
    assert "tiny" in said and "4 layers (0-3)" in said and f"{len(run.rows)} rows of 12 samples" in said
    assert "positions all" in said
    assert (left.get_xlabel(), left.get_ylabel()) == ("position in the sample (tokens)", "layer")


def test_rows_that_are_means_or_of_one_layer_have_the_axes_that_there_are(run: Run, place: Path, means: Path) -> None:
    [over_layers] = drawn(open_activations(means), means, pictures=("norms",)).values()
    assert [axes.get_xlabel() for axes in over_layers.axes] == ["layer"]
    assert set(lines(over_layers.axes[0])) == {"mean of all rows", "all rows, median"}
    one = drawn(run, place, pictures=("norms",), layers=(2,), hook_points=("after_block",))["norms_after_block"]
    assert [axes.get_xlabel() for axes in one.axes] == ["position in the sample (tokens)"]
    first = np.linalg.norm(all_rows(run, 2)[run.rows.positions == 0], axis=1)
    apart = lines(one.axes[0])["layer 2, first token (position 0)"]
    np.testing.assert_allclose(apart, [[0], [np.median(first)]], rtol=1e-5)


def test_the_spectrum_is_that_of_the_rows_without_first_tokens(run: Run, place: Path) -> None:
    figure = drawn(run, place, pictures=("spectrum",), hook_points=("after_block",))["spectrum_after_block"]
    left, right, *_ = figure.axes
    for layer, line in enumerate(left.lines):
        rows = all_rows(run, layer)[run.rows.positions != 0]
        variances = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
        together = np.cumsum(variances) / variances.sum()
        np.testing.assert_allclose(line.get_ydata(), together, atol=1e-6)
        for share in (0.5, 0.9, 0.99):
            assert lines(right)[f"{share:.0%}"][1][layer] == np.argmax(together >= share) + 1
    assert len(left.lines) == LAYERS
    assert "without first tokens" in figure.texts[1].get_text()


def test_components_are_coloured_by_token_position_and_field(run: Run, place: Path) -> None:
    sampled = SampledRows.of(run, len(run.rows))
    keep = sampled.positions != 0
    rows = sampled.rows(run.site(3))[keep].astype(np.float64)
    u, s, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    options: dict[str, Any] = {"pictures": ("pca",), "hook_points": ("after_block",)}
    panel = drawn(run, place, **options)["pca_after_block"].axes[3]
    assert panel.get_title(loc="left") == "layer 3"
    assert panel.get_xlabel() == f"PC 1 ({s[0] ** 2 / (s**2).sum():.1%} of variance)"
    found = {group.get_label(): len(np.asarray(group.get_offsets())) for group in panel.collections}
    tokenizer = AutoTokenizer.from_pretrained(run.metadata["model_path"])
    counted = Counter(np.array(token_texts(tokenizer, sampled.token_ids))[keep].tolist())
    for token, count in counted.most_common(MOST_GROUPS - 2):  # those that come last may tie
        assert found[token_text(token)] == count
    assert sum(found.values()) == len(rows)
    points = drawn(run, place, color_by="position", **options)["pca_after_block"].axes[3].collections[0]
    same_up_to_signs(np.asarray(points.get_offsets()), u[:, :2] * s[:2])
    assert np.asarray(points.get_array()).tolist() == sampled.positions[keep].tolist()
    figure = drawn(run, place, color_by="label", **options)["pca_after_block"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "a"], "the most frequent first"
    by_label = {group.get_label(): len(group.get_offsets()) for group in figure.axes[0].collections}
    labels = np.array([run[i].fields["label"] for i in range(SAMPLES)])
    of_row = labels[run.rows.sample_indices][run.rows.positions != 0]
    assert by_label == {"a": (of_row == "a").sum(), "b": (of_row == "b").sum()}
    sizes = drawn(run, place, color_by="size", **options)["pca_after_block"].axes[0].collections[0]
    assert np.unique(np.asarray(sizes.get_array())).tolist() == list(range(1, SAMPLES)), "numbers are a scale"


def test_the_logit_lens_says_what_the_model_says(run: Run, place: Path, model: Path) -> None:
    figure = drawn(run, place, pictures=("lens",), sample="s5")["lens"]
    axes, loaded = figure.axes[0], load_model(model)
    sample = run["s5"]
    cells = [text.get_text() for text in axes.texts if text.get_gid() == "likeliest"]
    words = np.array(cells, object).reshape(LAYERS, -1)
    columns = words.shape[1]
    assert columns == min(14, len(sample.token_ids))
    for layer in range(LAYERS):
        likeliest = loaded.logits_of(sample.get(layer)[-columns:]).argmax(axis=1)
        assert words[layer].tolist() == [token_text(text, 9) for text in token_texts(loaded.tokenizer, likeliest)]
    logits = loaded.run(sample.token_ids, logits="all").logits[0].astype(np.float64)[-columns:]
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    shades = np.asarray(axes.collections[0].get_array()).reshape(LAYERS, columns)
    np.testing.assert_allclose(
        shades[-1], chances.max(axis=1), rtol=1e-3, err_msg="the last layer's is the model's own"
    )
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks[-1] == f"{token_text(sample.tokens(loaded.tokenizer)[-1])}\n{len(sample.token_ids) - 1}"


def test_cells_are_framed_where_the_likeliest_token_follows() -> None:
    logits = np.full((3, 5), -9.0)
    logits[[0, 1, 2], [2, 4, 1]] = 0.0
    ids = np.array([3, 2, 4], np.int32)
    behind = np.array([following(ids, position) for position in range(3)])
    assert behind.tolist() == [2, 4, -1]
    lens = Lens.of([7], lambda _: logits, lambda rows: rows, ["0", "1", "2"], ids, behind)
    assert lens.follows.tolist() == [[True, True, False]]
    figure = draw_lens(lens, lambda tokens: [f"t{i}" for i in tokens], "")
    assert len(figure.axes[0].patches) == 2
    bold = [text.get_text() for text in figure.axes[0].texts if text.get_weight() == "bold"]
    assert bold == ["t2", "t4"]


def test_a_lens_of_runs_with_a_row_a_sample_is_of_several_samples(model: Path, tmp_path: Path) -> None:
    place = written(model, tmp_path, positions="last")
    axes = drawn(open_activations(place), place, pictures=("lens",))["lens"].axes[0]
    below = [label.get_text().partition("\n")[2] for label in axes.get_xticklabels()]
    assert below == [f"s{i}" for i in range(SAMPLES)]


def test_means_are_drawn_without_colours_and_without_a_lens(means: Path) -> None:
    found = list(RunPictures(open_activations(means), PlotConfig(str(means)), SILENT).draw())
    left_out = [each for each in found if isinstance(each, LeftOut)]
    assert [each.picture for each in left_out] == ["lens"] and "mean of a sample" in left_out[0].why
    [points] = found[2].figure.axes[0].collections  # type: ignore[union-attr]
    assert len(points.get_offsets()) == SAMPLES


def test_no_more_rows_are_read_than_asked_for_in_whole_samples_from_all_lengths(run: Run) -> None:
    total, longest = len(run.rows), int(np.diff(run.rows.row_offsets).max())
    for most in (2, 40, total // 2, total):
        for seed in range(5):
            found = SampledRows.of(run, most, seed)
            assert 0 < len(found) <= min(total, 2 * most + longest)
            counts = np.bincount(found.sample_of_row)
            assert len(counts) == len(found.metas)
            for number, meta in enumerate(found.metas):
                sample = run[meta["fields"]["size"]]
                there = found.sample_of_row == number
                assert found.positions[there].tolist() == sample.positions.tolist(), "whole"
                assert np.array_equal(found.rows(run.site(3))[there], sample.get(layer=3))
    assert len(SampledRows.of(run, total)) == total
    assert {len(SampledRows.of(run, 40, seed).metas) for seed in range(8)} != {SAMPLES}


def test_components_of_more_columns_than_rows_and_of_rows_that_are_not_finite() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(7, 20)).astype(np.float32)
    found = Components.of(np.concatenate([rows, np.full((1, 20), np.nan, np.float32)]))
    u, s, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(found.shares[:6], (s**2 / (s**2).sum())[:6], atol=1e-6)
    same_up_to_signs(found.along[:7], u[:, :2] * s[:2])
    assert np.isnan(found.along[7]).all()
    assert Components.of(np.ones((3, 2), np.float32)).shares.tolist() == [0.0, 0.0]


def test_labels_are_grouped_and_shown_as_they_can_be_printed() -> None:
    colouring = Colouring.of_labels("token", [*"aaab", None, *map(str, range(9))])
    assert colouring.groups[:2] == ("a", "b") and len(colouring.groups) == MOST_GROUPS <= len(COLOURS)
    assert colouring.group_of[:5].tolist() == [0, 0, 0, 1, -1] and (colouring.group_of == -1).sum() == 5
    assert token_text(" the\n") == "␣the\\n" and label_text("two words") == "two words"
    assert token_text("\u4e2d") == "\\u4e2d" and label_text("abcdefgh", 5) == "abcd…"


# ---------------------------------------------------------------------------------------------- of stage 02


def test_the_loss_is_that_of_the_log_beside_the_entropy(stage: Path) -> None:
    place = StagePlace.find(stage / "run")
    assert place is not None
    [picture] = StagePictures(place, PlotConfig(str(stage / "run"), pictures=("loss",))).draw()
    assert isinstance(picture, Drawn)
    log = read_state(KIND, stage / "run" / "final_model", "").log_history
    left, right = picture.figure.axes
    said = lines(left)
    trained_losses = [entry["loss"] for entry in log if "loss" in entry]
    assert said["training loss"][1].tolist() == trained_losses and len(trained_losses) == 4
    assert said["validation loss"].T.tolist() == [[e["step"], e["eval_loss"]] for e in log if "eval_loss" in e]
    entropy = np.log(8)
    assert said[f"entropy of the walk, {entropy:.4f}"][1] == pytest.approx([entropy] * 2)
    assert said[f"guessing a node, {np.log(25):.4f}"][1] == pytest.approx([np.log(25)] * 2)
    np.testing.assert_allclose(lines(right)["training loss"][1], np.array(trained_losses) - entropy, rtol=1e-6)


def test_the_map_has_every_node_every_edge_and_the_distances(stage: Path) -> None:
    place = StagePlace.find(stage / "run")
    assert place is not None
    [_, picture] = StagePictures(place, PlotConfig(str(stage / "run"))).draw()
    assert isinstance(picture, Drawn) and picture.name == "nodes"
    folder = stage / "run" / "token_representations"
    info = json.loads((folder / "representation_info.json").read_text())
    with np.load(folder / "token_representations.npz") as arrays:
        rows = arrays["layer_1_after_block"].astype(np.float64)
    u, s, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    axes = picture.figure.axes[1]
    edges, points = axes.collections
    same_up_to_signs(np.asarray(points.get_offsets()), u[:, :2] * s[:2])
    assert len(edges.get_segments()) == 25 * 8 // 2
    assert len(axes.texts) == 25 and np.asarray(points.get_array()).max() == 2, "edges to node 0"
    of_layer = info["graph_distances"]["layer_1_after_block"]
    found = lines(picture.figure.axes[2])["layer 1"]
    expected = [d / of_layer["mean_distance_all_pairs"] for d in of_layer["mean_distance_by_hops"].values()]
    np.testing.assert_allclose(found, [[1, 2], expected])


def test_a_map_is_drawn_without_the_graph_too(stage: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stage / "run" / "token_representations", tmp_path / "apart" / "rows"))
    place = StagePlace.find(folder)
    assert place is not None
    [alone] = StagePictures(place, PlotConfig(str(folder))).draw()
    [joined] = StagePictures(place, PlotConfig(str(folder), dataset_dir=str(stage / "dataset"))).draw()
    assert isinstance(alone, Drawn) and isinstance(joined, Drawn)
    assert [len(each.figure.axes[0].collections) for each in (alone, joined)] == [1, 2]


# ------------------------------------------------------------------------------------------- files and words


def test_the_python_of_the_page_draws(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "activations").symlink_to(place)
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plots.md").read_text(encoding="utf-8"), re.DOTALL)
    *lines, last = block.splitlines()
    names: dict[str, Any] = {}
    exec(compile("\n".join(lines), "plots.md", "exec"), names)
    figure = eval(last, names)
    assert isinstance(figure, Figure) and len(figure.axes[0].lines) == LAYERS


def test_the_command_writes_png_and_svg_and_the_run_is_what_it_was(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(place, tmp_path / "run"))
    before = snapshot(folder)
    flags = ["--pictures", "pca", "norms", "--hook_points", "after_block", "--layers", "1-2"]
    assert main(["plot", str(folder), *flags]) == 0
    said = whole_lines(capsys.readouterr().out)
    files = {path.name: path.read_bytes() for path in (folder / "plots").iterdir()}
    assert sorted(files) == [f"{name}_after_block.{kind}" for name in ("norms", "pca") for kind in ("png", "svg")]
    assert all(data.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml") for name, data in files.items())
    assert "read     all" in said and "norms_after_block.png and norms_after_block.svg" in said
    assert {name: data for name, data in snapshot(folder).items() if "plots" not in name} == before
    assert main(["status", str(folder)]) == 0
    assert "record" not in capsys.readouterr().out.lower().replace("records", ""), "pictures are no stray files"
    again = plot(PlotConfig(str(folder), pictures=("pca",), hook_points=("after_block",), layers=("1-2",)), SILENT)
    assert [path.read_bytes() for path in again] == [files[path.name] for path in again], "the same bytes"


def test_without_the_model_tokens_are_numbers_and_the_lens_is_left_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_activations(place)
    run.metadata["model_path"] = "/moved/away"  # type: ignore[index]
    pictures = RunPictures(run, PlotConfig(str(place), hook_points=("after_block",)), SILENT).draw()
    by_name = {each.name if isinstance(each, Drawn) else each.picture: each for each in pictures}
    labels = [text.get_text() for text in by_name["pca_after_block"].figure.legends[0].get_texts()]
    assert all(label.startswith("[") for label in labels[:-1])
    assert "/moved/away is not on this machine; give --model_path" in by_name["lens"].why


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pictures", "loss"], "--pictures loss is not of a run"),
        (
            ["--pictures", "pca", "--color_by", "nope"],
            "no sample has such a field; give token, position, or one of",
        ),
        (["--layers", "9"], "this run holds no layer 9; it holds 0-3"),
        (["--hook_points", "ffn_out"], "this run holds no 'ffn_out'; it holds: embeddings, after_block"),
        (["--rows", "1"], "--rows 1 is too few for a picture"),
        (["--seed=-1"], "--seed -1 is negative"),
        (["--pictures", "lens", "--sample", "s99"], "this run holds no sample 's99'"),
        (["--pictures", "lens", "--hook_points", "embeddings"], "--pictures lens: "),
        (["--pictures", "lens", "--model_path", "/nowhere/at/all"], "model '/nowhere/at/all' was not found"),
        (["--pictures", "norms", "--hook_points", "after_block", "--output_dir", "FILE"], "is no folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(
    flags: list[str], said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = [str(tmp_path / "file") if word == "FILE" else word for word in flags]
    if "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "plots")]
    assert main(["plot", str(place), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()


def test_means_places_and_models_of_others_are_refused_by_name(
    place: Path, means: Path, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, place: Path | str, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            plot(PlotConfig(str(place), output_dir=str(tmp_path / "plots"), **options), SILENT)

    refused(
        "every row is the mean of a sample; colour by one of its fields: label, line, size", means, color_by="token"
    )
    refused("the mean of a sample, which is of no token", means, pictures=("lens",))
    refused("holds no run, no training, no sparse autoencoders and no token representations", tmp_path)
    refused("--pictures pca is not of a training", stage / "run", pictures=("pca",))
    refused(r"there is no token_representations.npz", stage / "run" / "final_model", pictures=("nodes",))
    refused("there is no array of 'ffn_out'", stage / "run", hook_points=("ffn_out",), pictures=("nodes",))
    refused("is not the one that this run was made with", place, model_path=str(stage / "run" / "final_model"))
    with pytest.raises(UserError, match="a bucket takes no pictures; name a folder"):
        plot(PlotConfig("gs://nowhere/run"), SILENT)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    refused(r"matplotlib, which is not installed: pip install 'jax_extract\[plots\]'", place)
    assert not (tmp_path / "plots").exists()
