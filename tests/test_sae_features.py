"""`jax-extract sae features`: what the page shows of each feature is what NumPy finds in the run, whole and in order.

Also that no text of a token becomes markup, and that Neuronpedia's files have the fields that its converter reads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import make_model, run_cli, run_here, write_jsonl

from jax_extract import load_model, open_activations, train_saes
from jax_extract.errors import UserError
from jax_extract.sae.autoencoder import SparseAutoencoder
from jax_extract.sae.evaluation.stability import unit
from jax_extract.sae.features.command import sae_features
from jax_extract.sae.features.config import SaeFeaturesConfig
from jax_extract.sae.features.kept import Entries, Kept
from jax_extract.sae.features.page import as_json
from jax_extract.terminal import Terminal

WIDTH, LAYER, TOPS, EACH = 16, 1, 4, 2
OF_NEURONPEDIA = """feature_index neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
    correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices
    correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero
    freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values
    decoder_weights_dist vector activations""".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features")
    inputs = write_jsonl(root / "in.jsonl", np.random.default_rng(0).integers(20, 40, 150).tolist())
    model = make_model(root / "model", layers=3, hidden=WIDTH)
    run_here(model, inputs, root / "act", layers_to_extract=(LAYER,), positions="all")
    options: dict[str, Any] = {"expansion_factor": 2, "k": 4, "batch_size": 256, "training_rows": 30 * 256}
    train_saes(root / "act", root / "saes", seed=[0, 1], baselines="none", learning_rate=3e-3, silent=True, **options)
    return root


def sae_of(place: Path, seed: int = 0) -> Path:
    return place / "saes" / f"layer_1_batchtopk_d32_k4_seed{seed}"


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    config = SaeFeaturesConfig(str(sae_of(place)), features=("all",), contexts=(TOPS, EACH), before=5, after=3)
    return sae_features(config, Terminal(silent=True)).parent


@pytest.fixture(scope="module")
def data(made: Path) -> dict[str, Any]:
    text = (made / "features.html").read_text()
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="module")
def latents(place: Path) -> np.ndarray:
    """float32 [rows, latents] of the whole run; first tokens have none."""
    run = open_activations(place / "act")
    f = np.array(SparseAutoencoder.open(sae_of(place)).encode(run.get(layer=LAYER)))
    f[run.rows.positions == 0] = 0
    return f


def test_each_feature_has_the_texts_in_which_it_is_most_active(
    place: Path, data: dict[str, Any], latents: np.ndarray
) -> None:
    rows = open_activations(place / "act").rows
    alive = np.flatnonzero((latents > 0).any(axis=0))
    assert [feature["i"] for feature in data["features"]] == alive.tolist()
    for feature in data["features"]:
        f = latents[:, feature["i"]]
        assert feature["d"] == pytest.approx((f > 0).sum() / (rows.positions > 0).sum(), rel=1e-3)
        assert feature["m"] == pytest.approx(f.max(), rel=1e-3)
        by_text = np.maximum.reduceat(f, rows.row_offsets[:-1])
        expected = np.sort(by_text[by_text > 0])[::-1][:TOPS]
        got = [dict(context[3])[context[4]] for context in feature["top"]]
        np.testing.assert_allclose(got, expected, rtol=1e-3)
        assert len({data["samples"][context[0]] for context in feature["top"]}) == len(got), "a text once"


def test_windows_say_every_token_and_its_activation(place: Path, data: dict[str, Any], latents: np.ndarray) -> None:
    run = open_activations(place / "act")
    tokenizer = load_model(place / "model").tokenizer
    first = {sample.sample_id: int(run.rows.row_offsets[i]) for i, sample in enumerate(run.samples())}
    seen = 0
    for feature in data["features"]:
        groups = [context for _, _, contexts in feature["groups"] for context in contexts]
        for sample_number, begin, tokens, active, peak in [*feature["top"], *groups]:
            name = data["samples"][sample_number]
            sample = run.sample(name)
            assert begin == max(0, begin + peak - 5) and len(tokens) <= 9
            texts = sample.tokens(tokenizer)[begin : begin + len(tokens)]
            assert [data["tokens"][token] for token in tokens] == texts
            window = latents[first[name] + begin : first[name] + begin + len(tokens), feature["i"]]
            shown = np.zeros(len(tokens))
            for offset, value in active:
                shown[offset] = value
            np.testing.assert_allclose(shown, window, rtol=1e-3, atol=1e-6)
            assert shown[peak] > 0
            seen += 1
    assert seen > 100


def test_fifths_cover_the_activations_from_the_largest_on(data: dict[str, Any], latents: np.ndarray) -> None:
    for feature in data["features"]:
        f = latents[:, feature["i"]]
        active = np.sort(f[f > 0])[::-1]
        if 5 < len(active) <= 256:  # all of them are in the sample
            np.testing.assert_allclose(
                [[least, most] for least, most, _ in feature["groups"]],
                [[part.min(), part.max()] for part in np.array_split(active, 5)],
                rtol=1e-3,
            )
            assert sum(feature["h"]) == len(active)
        for least, most, contexts in feature["groups"]:
            assert len(contexts) <= EACH
            for context in contexts:
                assert least * 0.999 <= dict(context[3])[context[4]] <= most * 1.001


def test_neighbours_are_those_of_numpy(place: Path, data: dict[str, Any], latents: np.ndarray, made: Path) -> None:
    decoder = unit(np.asarray(SparseAutoencoder.open(sae_of(place)).params["W_dec"]))
    other = unit(np.asarray(SparseAutoencoder.open(sae_of(place, 1)).params["W_dec"]))
    cosines, on = decoder @ decoder.T, latents > 0
    np.fill_diagonal(cosines, -1)
    later = open_activations(place / "act").rows.positions > 0
    batch = json.loads((made / "neuronpedia" / "batch-0.json").read_text())["features"]
    for feature, told in zip(data["features"], batch, strict=True):
        i = feature["i"]
        assert [j for j, _ in feature["near"]] == np.argsort(-cosines[i])[:6].tolist()
        both = (on[:, [i]] & on).sum(axis=0)
        jaccard = both / np.maximum(on[:, i].sum() + on.sum(axis=0) - both, 1)
        jaccard[i] = 0
        np.testing.assert_allclose(
            [share for _, share in feature["co"]], [s for s in np.sort(jaccard)[::-1][:6] if s], rtol=1e-3
        )
        [[name, j, cosine]] = feature["seeds"]
        assert name == "seed 1" and j == (other @ decoder[i]).argmax()
        assert cosine == pytest.approx((other @ decoder[i]).max(), abs=1e-3)
        for j, value in zip(told["correlated_features_indices"], told["correlated_features_pearson"], strict=True):
            assert value == pytest.approx(np.corrcoef(latents[later, i], latents[later, j])[0, 1], abs=1e-3)


def test_logits_are_those_of_the_direction_behind_norm_and_head(place: Path, data: dict[str, Any]) -> None:
    model = load_model(place / "model")
    decoder = np.asarray(SparseAutoencoder.open(sae_of(place)).params["W_dec"])
    for feature in data["features"][:5]:
        [logits] = model.logits_of(decoder[[feature["i"]]])
        logits = logits - logits.mean()
        np.testing.assert_allclose([value for _, value in feature["pos"]], np.sort(logits)[::-1][:10], rtol=2e-3)
        np.testing.assert_allclose([value for _, value in feature["neg"]], np.sort(logits)[:10], rtol=2e-3)


def test_neuronpedias_files_have_what_its_converter_reads(data: dict[str, Any], made: Path) -> None:
    files = sorted((made / "neuronpedia").iterdir())
    assert [path.name for path in files] == ["batch-0.json"]
    batch = json.loads(files[0].read_text())
    assert {"model_id", "layer", "sae_set", "sae_id_suffix", "features"} == set(batch) and batch["layer"] == LAYER
    for feature, shown in zip(batch["features"], data["features"], strict=True):
        assert set(feature) == set(OF_NEURONPEDIA) and feature["feature_index"] == shown["i"]
        for name in ("freq_hist_data_bar", "logits_hist_data_bar"):
            assert len(feature[f"{name}_heights"]) == len(feature[f"{name}_values"]) > 0
        for activation in feature["activations"]:
            assert len(activation["tokens"]) == len(activation["values"])
            assert activation["values"][activation["qualifying_token_index"]] > 0
        assert len(feature["activations"]) == len(shown["top"]) + sum(len(group[2]) for group in shown["groups"])


def test_no_text_becomes_markup(made: Path) -> None:
    hostile = {"tokens": ["</script><script>alert(1)</script>", "<!--", "\u2028"]}
    assert "<" not in as_json(hostile) and json.loads(as_json(hostile)) == hostile
    page = (made / "features.html").read_text()
    assert "innerHTML" not in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page and "default-src 'none'" in page


def test_seeds_beside_it_are_found_from_a_relative_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    config = SaeFeaturesConfig(f"saes/{sae_of(place).name}", output_dir="relative", features=("5",))
    assert '"seeds":[["seed 1"' in sae_features(config, Terminal(silent=True)).read_text()


@pytest.mark.parametrize("waiting", [10, 1 << 21])
def test_what_is_kept_of_a_stream_is_what_sorting_all_of_it_keeps(waiting: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("jax_extract.sae.features.kept._WAITING", waiting)
    random = np.random.default_rng(0)
    latent, value = random.integers(0, 7, 5_000), random.permutation(5_000).astype(np.float32)
    kept = Kept(8, 6)
    for part in np.array_split(np.arange(5_000), 40):
        kept.add(Entries(latent[part], part, value[part], value[part]))
    found = kept.entries()
    for i in range(7):
        rows = found.row[found.latent == i]
        expected = np.flatnonzero(latent == i)
        assert rows.tolist() == expected[np.argsort(-value[expected])][:6].tolist()


def test_some_features_are_chosen_and_mistakes_are_told(place: Path, tmp_path: Path) -> None:
    def run(*flags: object) -> Any:
        return run_cli("sae", "features", *flags, script=None, cwd=tmp_path)

    alive = SaeFeaturesConfig(str(sae_of(place)), output_dir=str(tmp_path / "some"), features=("3", "7", "3"))
    page = sae_features(alive, Terminal(silent=True)).read_text()
    assert re.findall(r'\{"i":(\d+),"d"', page) == ["3", "7"]
    for said, flags in {
        "holds 2 SAEs; name one of them": [place / "saes"],
        "--features 'many' is no number": [sae_of(place), "--features", "many"],
        "--features all 3 names all and others": [sae_of(place), "--features", "all", "3"],
        "--features 99: this SAE has the features 0 to 31": [sae_of(place), "--features", "1", "99"],
        "--rows 0 must be from 1": [sae_of(place), "--rows", "0"],
        "--contexts 0 0 must be two numbers": [sae_of(place), "--contexts", "0", "0"],
    }.items():
        done = run(*flags, "--output_dir", tmp_path / "refused")
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    fifths = SaeFeaturesConfig(str(sae_of(place)), output_dir=str(tmp_path / "f"), features=("5",), contexts=(0, 2))
    assert '"top":[]' in sae_features(fifths, Terminal(silent=True)).read_text()
    means = tmp_path / "means"
    run_here(place / "model", place / "in.jsonl", means, layers_to_extract=(LAYER,), positions="mean")
    with pytest.raises(UserError, match="are means over texts, which no token can be shown of"):
        sae_features(SaeFeaturesConfig(str(sae_of(place)), activations=str(means)), Terminal(silent=True))
