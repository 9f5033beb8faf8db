"""`jax-extract token-representations`: one row a token of the vocabulary, at every layer and hook point asked for.

In: a model, and walks where the mean over a token's occurrences is wanted. Out: token_representations.npz, an array
[vocab_size, width] for each `layer_{i}_{hook}`, and representation_info.json, which is written last. The rows come from
the compiled forward that every extraction uses.
"""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.config import ExtractConfig
from jax_extract.devices.choice import use_devices
from jax_extract.errors import UserError, user_path
from jax_extract.extraction.jax_backend import open_mesh
from jax_extract.extraction.loop import STEPS_IN_MEMORY, LoopStatistics, run_parts
from jax_extract.extraction.prepare import Job
from jax_extract.extraction.summary import captures_text, tell_model
from jax_extract.inputs.graphs import Graph
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.inputs.planning.windows import Part, Window, plan_windows
from jax_extract.inputs.text import jsonl_samples
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.inputs.walk_dataset import WalkDataset
from jax_extract.inputs.wrapping import Wrapping
from jax_extract.progress import LOADING
from jax_extract.representations.averages import TokenMeans, bytes_of_sums
from jax_extract.representations.config import RepresentationsConfig
from jax_extract.representations.distances import GraphDistances, graph_distances, measurable
from jax_extract.store.budget import ByteBudget, default_limit
from jax_extract.store.folders import require_usable, write_file
from jax_extract.terminal import Terminal, bytes_text, plural
from jax_extract.weights.open_model import OpenModel
from models.hooks import resolve_hook_points

NPZ_FILE, INFO_FILE = "token_representations.npz", "representation_info.json"
_TOKENS_AT_ONCE, _WALKS_AT_ONCE = 512, 64


def token_representations(config: RepresentationsConfig, terminal: Terminal | None = None) -> dict[str, Any]:
    """Writes the two files; returns what representation_info.json says.

    Raises:
      UserError: anything the user can mend; what was there before stays until all is computed.
    """
    config.check()
    terminal = terminal or Terminal()
    folder = user_path(config.representation_dir, "--representation_dir")
    require_usable(folder, "--representation_dir")
    if config.check_only:
        resolve_hook_points(config.representations)
        use_devices(config.device)
        open_mesh(config.mesh_shape)
        return {}
    model = OpenModel.open(config.model_path)
    dataset = None
    if config.dataset_dir is not None:
        dataset = WalkDataset.open(user_path(config.dataset_dir, "--dataset_dir"), config.text_column)
        _require_same_vocabulary(model, dataset)
    use_devices(config.device)
    return _Representations(config, folder, dataset, _job(config), terminal).run()


def _job(config: RepresentationsConfig) -> Job:
    return Job.open(
        ExtractConfig(
            model_path=config.model_path,
            layers_to_extract=("all",) if config.layers is None else config.layers,
            hook_points=config.representations,
            positions="all",
            dtype=config.dtype,
            mesh_shape=config.mesh_shape,
            max_seq_length=1 if config.source == "tokens" else None,
        )
    )


def _require_same_vocabulary(model: OpenModel, dataset: WalkDataset) -> None:
    vocabulary = model.tokenizer.get_vocab()
    if other := sorted(set(dataset.vocabulary.items()) - set(vocabulary.items())):
        word, token = other[0]
        raise UserError(
            f"{dataset.folder} has the word {word[:40]!r} as token {token} and the tokenizer of "
            f"{model.checkpoint.source} has not; give the dataset that the model was trained on"
        )


@dataclass(frozen=True)
class _Representations:
    config: RepresentationsConfig
    folder: Path
    dataset: WalkDataset | None
    job: Job
    terminal: Terminal

    def run(self) -> dict[str, Any]:
        vocab_size = self.job.model.config.vocab_size
        needed, room = bytes_of_sums(self.job.sites, vocab_size), 2 * default_limit()
        if needed > room:
            raise UserError(
                f"{plural(len(self.job.sites), 'representation')} of {vocab_size:,} tokens take {bytes_text(needed)} "
                f"of memory and {bytes_text(room)} are free for them; ask for fewer --representations or --layers"
            )
        tell_model(self.job, 1, self.terminal)
        self.terminal.line("capture", f"{captures_text(self.job.plan)}; {self._source_text}")
        counts = InputCounts()
        means = self._means(vocab_size, counts)
        distances: dict[str, GraphDistances] = {}
        info = self._write(means, counts, distances)
        self._conclude(means, distances)
        return info

    @property
    def _source_text(self) -> str:
        if self.dataset is None or self.config.source == "tokens":
            return "each token alone"
        return f"means over the {self.config.walks} walks of {self.dataset.folder}"

    # ------------------------------------------------------------------------------------ computing

    def _means(self, vocab_size: int, counts: InputCounts) -> TokenMeans:
        at_once = _TOKENS_AT_ONCE if self.config.source == "tokens" else _WALKS_AT_ONCE
        settings = self.job.plan_settings(ExtractConfig(batch_size=self.config.batch_size or at_once))
        job = self.job.under(settings)
        windows = plan_windows(self._samples(vocab_size, counts), settings)
        if (first := next(windows, None)) is None:
            raise UserError("the walks hold no token; make the dataset anew with jax-extract walks")
        budget = ByteBudget(STEPS_IN_MEMORY * job.bytes_on_host(first.shapes))
        with self.terminal.waiting(LOADING) as waiting:
            program = job.program(job.weights(), first.shapes, first.shapes[-1:], waiting.say)
        means = TokenMeans(job.sites, vocab_size)
        total = vocab_size if self.config.source == "tokens" else None
        with self.terminal.progress(total) as bar:

            def advance(so_far: LoopStatistics, _: SlabShape) -> None:
                bar.update(so_far.tokens - bar.n)

            run_parts(_parts(itertools.chain([first], windows)), program, means, budget, advance, bar.say)
        return means

    def _samples(self, vocab_size: int, counts: InputCounts) -> Iterator[TokenizedSample]:
        """Every token alone, or the walks."""
        if self.config.source == "tokens":
            return (
                TokenizedSample(token, str(token), np.array([token], np.int32), 1, {}) for token in range(vocab_size)
            )
        assert self.dataset is not None
        walks = jsonl_samples(self.dataset.folder / f"{self.config.walks}.jsonl", self.dataset.text_column)
        return self.job.tokenized(walks, Wrapping(), counts)

    # -------------------------------------------------------------------------------------- writing

    def _write(self, means: TokenMeans, counts: InputCounts, distances: dict[str, GraphDistances]) -> dict[str, Any]:
        """The arrays, then what is said of them; `distances` is filled on the way, an array at a time."""
        graph = self.dataset.graph if self.dataset else None
        hops = graph.hops() if graph is not None and measurable(graph) else None
        shapes: dict[str, list[int]] = {}

        def arrays() -> Iterator[tuple[str, np.ndarray]]:
            for key, array in means.means():
                shapes[key] = list(array.shape)
                found = None if hops is None or len(array) != len(hops) else graph_distances(array, hops)
                if found is not None:
                    distances[key] = found
                yield key, array

        self.folder.mkdir(parents=True, exist_ok=True)
        old = self.folder / INFO_FILE  # of the arrays that are replaced
        write_file(self.folder / NPZ_FILE, lambda path: _write_npz(path, arrays()), lambda: old.unlink(missing_ok=True))
        info = self._info(means, counts, shapes, distances, graph)
        text = json.dumps(info, indent=2) + "\n"
        write_file(self.folder / INFO_FILE, lambda path: _write_text(path, text))
        return info

    def _info(
        self,
        means: TokenMeans,
        counts: InputCounts,
        shapes: Mapping[str, list[int]],
        distances: Mapping[str, GraphDistances],
        graph: Graph | None,
    ) -> dict[str, Any]:
        job, model = self.job, self.job.model.config
        missing = np.flatnonzero(means.occurrences == 0)
        return {
            "model": {
                "name": job.model.name,
                "model_path": job.model.checkpoint.source,
                "model_type": model.model_type,
                "num_hidden_layers": model.num_hidden_layers,
                "hidden_size": model.hidden_size,
                "intermediate_size": model.intermediate_size,
            },
            "representations": [hook for hook, _ in job.plan.layers],
            "vocab_size": model.vocab_size,
            "arrays": dict(shapes),
            "dtype": "float32",
            "source": self.config.source,
            "walks": self.config.walks if self.config.source == "occurrences" else None,
            "occurrences": int(means.occurrences.sum()),
            "tokens_without_occurrence": missing.tolist(),
            "truncated_walks": counts.truncated_samples,
            "numerics": job.backend.fingerprint(),
            "graph": graph.name if graph else None,
            "graph_distances": {key: found.as_json() for key, found in distances.items()},
        }

    def _conclude(self, means: TokenMeans, distances: Mapping[str, GraphDistances]) -> None:
        never = int((means.occurrences == 0).sum())
        self.terminal.line(
            "done",
            f"{plural(len(self.job.sites), 'array')} of {plural(len(means.occurrences), 'token')}, from "
            f"{plural(int(means.occurrences.sum()), 'occurrence')}"
            + (f"; {plural(never, 'token')} never occurred and have rows of NaN" if never else ""),
        )
        if distances:
            key, best = min(distances.items(), key=lambda entry: entry[1].neighbours)
            said = ", ".join(f"{hops}: {distance:.3g}" for hops, distance in best.by_hops.items())
            self.terminal.line(
                "graph",
                f"in {key} neighbours lie at {best.neighbours:.1%} of the mean distance of two nodes; mean distance by "
                f"edges between them: {said}",
            )
        self.terminal.line("output", f"{self.folder / NPZ_FILE}")


def _parts(windows: Iterable[Window]) -> Iterator[Part]:
    for window in windows:
        yield from window.parts


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_npz(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """As `numpy.savez` writes it, an array at a time; the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for key, array in arrays:
            entry = zipfile.ZipInfo(f"{key}.npy")
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
