"""Computes samples of a run again, and says how far the stored rows are from a reference.

In: parts without a flaw, and the model. Out: a verdict on each hook point and layer. One sample is in memory at
once, and the model sees its token ids as they are stored, not the text again.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jax_extract.errors import damage_is_told
from jax_extract.forward.edits import Edits, Placed
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.store.ledger import Key, part_name
from jax_extract.store.sidecar import Sidecar, StoredArray
from jax_extract.terminal import Terminal
from jax_extract.verification.reading import Layout, WholePart
from jax_extract.verification.reference import References, SiteErrors, SiteKey, SiteVerdict, Wanted
from jax_extract.weights.open_model import OpenModel
from models.positions import Positions

_BEGINNINGS = 64  # of each sample, in which the peer's worst row is looked for as well


@dataclass(frozen=True)
class _Chosen:
    """A sample to compute again: a part, and the sample's place in it."""

    part: WholePart
    place: int

    @property
    def length(self) -> int:
        return int(self.part.lengths[self.place])


def choose(parts: Mapping[Key, WholePart], positions: Positions, count: int, seed: int) -> dict[Key, list[_Chosen]]:
    """Samples to compute again, by part: the longest, the shortest, and others spread over lengths and parts.

    One sample is drawn from each of equal strata of length, from the part that has given the fewest so far.
    """
    keys = list(parts)
    if not keys:
        return {}
    lengths = np.concatenate([parts[key].lengths for key in keys])
    part = np.repeat(np.arange(len(keys)), [len(parts[key].lengths) for key in keys])
    place = np.concatenate([np.arange(len(parts[key].lengths)) for key in keys])
    order = np.argsort(lengths, kind="stable")
    distinct = np.unique(lengths)
    order = order[np.isin(lengths[order], [n for n in distinct if positions.rows(int(n))])]  # those that gave a row
    between = np.array_split(order[1:-1], count - 2) if count > 2 else []  # noqa: PLR2004 (longest and shortest)
    random = np.random.default_rng(seed)
    used = np.zeros(len(keys), np.int64)
    chosen: dict[Key, list[_Chosen]] = {}
    for stratum in (order[-1:], order[:-1][:1], *between):
        if len(stratum):
            shuffled = random.permutation(stratum)
            one = shuffled[np.argmin(used[part[shuffled]])]
            used[part[one]] += 1
            key = keys[part[one]]
            chosen.setdefault(key, []).append(_Chosen(parts[key], int(place[one])))
    return dict(sorted(chosen.items()))


@dataclass
class Comparison:
    """Computes the chosen samples again, and gathers how far the stored rows are.

    Attributes:
      sites: a verdict on each; none where there was no sample to compute.
      samples: which were computed.
      compared_with: the reference, for people and scripts.
      notes: why it is not the first choice, and what was not judged.
    """

    layout: Layout
    model: OpenModel
    chosen: Mapping[Key, Sequence[_Chosen]]
    edits: Edits | None = None
    sites: list[SiteVerdict] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    compared_with: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self, terminal: Terminal) -> None:
        if not self.chosen:
            return
        layout = self.layout
        references = References.open(self.model, layout.sites, layout.computed_in, self.notes.append)
        if references is None:
            return
        if layout.computed_in == "bfloat16" and references.peer is None:
            self.notes.append(
                "a bfloat16 run is judged by the errors of Hugging Face in bfloat16, which cannot be had here: its "
                "errors are told and not judged; pip install torch to have them judged"
            )
        self.compared_with = {
            "name": references.truth.name,
            "judged_by": references.peer.name if references.peer else None,
            "versions": {**references.truth.versions, "jax_extract": importlib.metadata.version("jax_extract")},
            "model": self.model.checkpoint.source,
        }
        errors = {site.key: SiteErrors() for site in layout.sites}
        tokens = sum(sample.length for samples in self.chosen.values() for sample in samples)
        with terminal.progress(tokens, "recomputing") as bar:
            for key, samples in self.chosen.items():
                sidecar = samples[0].part.sidecar()
                for sample in samples:
                    self._compare(key, sample, sidecar, references, errors)
                    bar.update(sample.length)
        self.sites = [errors[site.key].verdict(site, layout.computed_in) for site in layout.sites]

    def _compare(
        self,
        key: Key,
        sample: _Chosen,
        sidecar: Sidecar,
        references: References,
        errors: Mapping[SiteKey, SiteErrors],
    ) -> None:
        """Every stored row of one sample; the model sees the token ids as they are stored, not the text again."""
        content, sites = sidecar.content, self.layout.sites
        tokens, positions = content.token_ids[sample.place], content.positions[sample.place]
        first = int(content.row_offsets[sample.place])
        arrays = {array.site.key: array for array in sidecar.arrays}
        # Under edits, which may be of a sample's last tokens, its beginnings are no samples.
        beginnings = _BEGINNINGS if references.peer and not self.edits else 0
        wanted = Wanted.of(tokens, positions, beginnings, self.layout.positions.begins)
        if self.edits:
            place = sample.place
            whole = TokenizedSample(
                int(content.sample_indices[place]), content.sample_ids[place], tokens, len(tokens), content.meta[place]
            )
            wanted = replace(wanted, changes=self.edits.interventions([Placed(0, 0, whole)], (1, len(tokens))))
        theirs = references.peer.rows(wanted, sites) if references.peer else None
        for site, truth in references.truth.rows(wanted, sites):
            stored = self._stored(sample.part, arrays[site.key], first, len(positions))
            errors[site.key].add(stored, truth, next(theirs)[1] if theirs else None)
        self.samples.append(
            {
                "sample_id": content.sample_ids[sample.place],
                "sample_index": int(content.sample_indices[sample.place]),
                "part": part_name(key),
                "tokens": len(tokens),
                "rows": len(positions),
            }
        )

    def _stored(self, part: WholePart, array: StoredArray, first: int, rows: int) -> np.ndarray:
        """Rows as they are stored, [rows, width]; their blocks were checked before."""
        row_bytes = array.site.width * self.layout.dtype.itemsize
        data = np.empty(rows * row_bytes, np.uint8)
        generation = next(file.get("generation") for file in part.record["files"] if file["path"] == array.path)
        with damage_is_told(f"shard {array.path}", "it changed while it was verified: verify again"):
            got = part.storage.read_into(array.path, array.offset + first * row_bytes, data.data, generation)
            if got < len(data):
                raise ValueError("it is cut short")
        return data.view(self.layout.dtype).reshape(rows, array.site.width)
