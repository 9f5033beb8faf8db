"""Features as files that Neuronpedia takes: batch-0.json, … as SAEDashboard's runner for Neuronpedia writes them.

In: features, the texts of tokens. Out: JSON objects of up to 128 features each. Neuronpedia's converter
(utils/neuronpedia-utils) makes an upload of a folder of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jax_extract.sae.features.contexts import Context
from jax_extract.sae.features.feature import Feature
from jax_extract.sae.features.page import rounded

FEATURES_A_FILE = 128
_OF_NEURONS = ("neuron_alignment", "correlated_neurons")  # of the model's own neurons, which an SAE knows nothing of
TextOf = Callable[[np.ndarray], Sequence[str]]


def batches(
    features: Sequence[Feature], token_texts: TextOf, model: str, layer: int | None, sae_set: str, suffix: str
) -> Iterator[dict[str, Any]]:
    """Args:
    model: its name at Neuronpedia; sae_set, suffix: under which the SAE is found there.
    """
    for start in range(0, len(features), FEATURES_A_FILE):
        some = features[start : start + FEATURES_A_FILE]
        yield {
            "model_id": model,
            "layer": 0 if layer is None else layer,
            "sae_set": sae_set,
            "sae_id_suffix": suffix,
            "features": [_feature(feature, token_texts) for feature in some],
        }


def _feature(feature: Feature, token_texts: TextOf) -> dict[str, Any]:
    said: dict[str, Any] = {"feature_index": feature.latent}
    for name in _OF_NEURONS:
        said |= {f"{name}_{column}": [] for column in ("indices", "pearson" if "corr" in name else "values", "l1")}
    said |= {
        "correlated_features_indices": [each.latent for each in feature.correlated],
        "correlated_features_pearson": [rounded(each.value) for each in feature.correlated],
        "correlated_features_l1": [],
        "frac_nonzero": feature.density,
        "freq_hist_data_bar_heights": feature.counts.tolist(),
        "freq_hist_data_bar_values": _middles(feature.edges),
        "decoder_weights_dist": [],
        "vector": [rounded(float(value)) for value in feature.direction],
    }
    logits = feature.logits
    for name in ("neg_str", "neg_values", "pos_str", "pos_values"):
        said[name] = []
    said |= {"logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": []}
    if logits is not None:
        said |= {
            "neg_str": list(token_texts(logits.least)),
            "neg_values": [rounded(float(value)) for value in logits.least_values],
            "pos_str": list(token_texts(logits.most)),
            "pos_values": [rounded(float(value)) for value in logits.most_values],
            "logits_hist_data_bar_heights": logits.counts.tolist(),
            "logits_hist_data_bar_values": _middles(logits.edges),
        }
    shown = [(context, -1.0, -1.0, -1.0) for context in feature.top]  # as SAEDashboard marks the top ones
    for group in feature.groups:
        share = len(group.contexts) / max(1, sum(len(each.contexts) for each in feature.groups))
        shown += [(context, group.least, group.most, share) for context in group.contexts]
    said["activations"] = [_activation(*each, token_texts) for each in shown]
    return said


def _activation(context: Context, least: float, most: float, share: float, token_texts: TextOf) -> dict[str, Any]:
    return {
        "bin_min": rounded(least),
        "bin_max": rounded(most),
        "bin_contains": rounded(share),
        "tokens": list(token_texts(context.tokens)),
        "values": [rounded(float(value)) for value in context.values],
        "qualifying_token_index": context.peak,
    }


def _middles(edges: np.ndarray) -> list[float]:
    """One value for each bar: its middle."""
    return [rounded(float(value)) for value in (edges[:-1] + edges[1:]) / 2]
