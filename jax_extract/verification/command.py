"""`jax-extract verify`: shows that a run is what it says, or names what is not.

In: a run, finished or not, in a directory or a bucket, and the model it was made with. Out: a `Verdict`, as
lines and as `verification.json` beside metadata.json. First every record is read, every file against its
checksums, every sidecar against its record and the plan; then some samples are computed again by an
independent reference, and every stored row of theirs is compared. One part and one sample are in memory at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
import tyro

from jax_extract.errors import UserError, damage_is_told
from jax_extract.forward.edit_files import read_edits
from jax_extract.forward.edits import Edits
from jax_extract.store.finite import FLOAT16_ENDS
from jax_extract.store.integrity import some_of
from jax_extract.store.ledger import Ledger, to_json
from jax_extract.store.metadata import VERIFICATION_FILE
from jax_extract.store.storage.opening import open_storage
from jax_extract.terminal import Terminal, bytes_text, plural
from jax_extract.verification.comparison import Comparison, choose
from jax_extract.verification.reading import RESTORE, Layout, NotFinite, Reading
from jax_extract.verification.reference import SiteVerdict, plan_of
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from jax_extract.weights.unported import AllWeights
from models.ports import Port, hook_width

_SAMPLES_NAMED = 5  # on a line; verification.json names more


@dataclass(frozen=True)
class VerifyConfig:
    """Read every checksum of a run, and compute samples of it again.

    Exit code 1 when something is not as it should be.

    Attributes:
      place: run directory or gs://bucket/prefix.
      samples: how many samples are computed again; the longest and the shortest always are.
      seed: of their choice.
      model_path: where the model is now, if not where the run found it.
      adapter: where its LoRA adapter is now, if not where the run found it.
      edits: where the file of its edits is now, if not where the run found it.
    """

    place: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLACE")]
    samples: int = 16
    seed: int = 0
    model_path: str | None = None
    adapter: str | None = None
    edits: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What `verification.json` says.

    Attributes:
      verdict: the gravest that is true: `damaged`, `out of bounds`, `not finite`, `unfinished`, else `verified`.
      date: UTC, when the reading began.
      read: how many parts, files, bytes and blocks were read, and how many samples are in parts without a flaw.
      damaged, missing: sentences, one a thing.
      not_finite: rows with infinite or undefined values, of each hook point and layer that has any.
      reference: what the rows were compared with, and in which versions.
      samples: those computed again.
      notes: what else a reader of the verdict must know.
    """

    verdict: str
    place: str
    run_id: str
    date: str
    read: Mapping[str, int]
    damaged: Sequence[str]
    missing: Sequence[str]
    not_finite: Sequence[NotFinite]
    reference: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    sites: Sequence[SiteVerdict]
    notes: Sequence[str]

    @property
    def exit_status(self) -> int:
        """An unfinished run is told, and is nobody's mistake; `jax-extract status` answers whether all is there."""
        return 1 if self.verdict in ("damaged", "out of bounds", "not finite") else 0

    def to_json(self) -> bytes:
        sites = [_plain({**dataclasses.asdict(site), "ok": site.ok}) for site in self.sites]
        return to_json({**dataclasses.asdict(self), "sites": sites})


def verify_command(config: VerifyConfig) -> int:
    """Verifies and tells; 1 where something is damaged, out of bounds or not finite, else 0."""
    verdict = verify(
        config.place,
        samples=config.samples,
        seed=config.seed,
        model_path=config.model_path,
        adapter=config.adapter,
        edits=config.edits,
    )
    return verdict.exit_status


def verify(
    place: str,
    *,
    samples: int = 16,
    seed: int = 0,
    model_path: str | None = None,
    adapter: str | None = None,
    edits: str | None = None,
    terminal: Terminal | None = None,
) -> Verdict:
    """Verifies what is committed of a run, tells it line by line, and writes the verdict beside the metadata.

    Raises:
      UserError: there is no run, or its model is not there, or is another one.
    """
    terminal = terminal or Terminal()
    if samples < 1:
        raise UserError(f"--samples {samples} must be at least 1; the longest and the shortest are always among them")
    if seed < 0:
        raise UserError(f"--seed {seed} is negative; give a whole number from 0 on")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    ledger = Ledger.open(open_storage(place, "the place to verify"))
    layout = Layout.of(ledger)
    model = _open_model(ledger, layout, model_path, adapter)  # before the long reading: it may be the wrong one
    made = _open_edits(ledger, model, edits)

    reading = Reading(ledger, layout)
    reading.run(terminal)
    _tell_reading(reading, terminal)
    _tell_not_finite(reading, terminal)
    comparison = Comparison(layout, model, choose(reading.whole, layout.positions, samples, seed), made)
    comparison.run(terminal)
    _tell_comparison(comparison, reading, terminal)

    verdict = Verdict(
        verdict=_gravest(reading, comparison),
        place=place,
        run_id=str(ledger.run["run_id"]),
        date=date,
        read={**reading.counts, "samples": sum(len(part.lengths) for part in reading.whole.values())},
        damaged=reading.damaged,
        missing=reading.missing,
        not_finite=list(reading.not_finite.values()),
        reference=comparison.compared_with,
        samples=comparison.samples,
        sites=comparison.sites,
        notes=comparison.notes,
    )
    _tell_verdict(verdict, terminal)
    ledger.storage.replace(VERIFICATION_FILE, verdict.to_json())
    return verdict


def _open_model(ledger: Ledger, layout: Layout, model_path: str | None, adapter: str | None) -> OpenModel:
    """The model that the run names, or where the user says it is now; UserError unless it is the run's."""
    with damage_is_told(f"the run in {ledger.storage}", RESTORE):
        model_type, weights = ledger.run["identity"]["model_type"], str(ledger.run["identity"]["weights"])
        described = ledger.run["description"]
        source, revision, adapted = str(described["model_path"]), described["model_revision"], described.get("adapter")
    try:
        model = OpenModel.open(model_path or source, revision, adapter or adapted, needs_port=False)
    except UserError as error:
        if model_path or adapter:
            raise
        raise UserError(
            f"{error}; the run was made with it: say where it is now with --model_path"
            + (", and where its adapter is with --adapter" if adapted else "")
        ) from None
    source = model.checkpoint.source
    if model.config.model_type != model_type:
        raise UserError(f"{source} is of type {model.config.model_type!r} and the run of {model_type!r}; {_WRONG}")
    plan = plan_of(layout.sites, model.config)
    blocks = plan.blocks_needed(model.config.num_hidden_layers)
    ours = isinstance(model.family, Port)
    read = Weights(model.checkpoint, model.port, model.config, blocks) if ours else AllWeights(model.checkpoint)
    found = read.provenance()
    if found != weights:
        raise UserError(f"the weights of {source} are {found[:19]}… and those of the run {weights[:19]}…; {_WRONG}")
    for site in layout.sites:
        if (width := hook_width(model.config, site.hook, plan.pattern_tokens)) != site.width:
            raise UserError(f"{source} has {width} values a row at {site.hook} and the run {site.width}; {_WRONG}")
    return model


def _open_edits(ledger: Ledger, model: OpenModel, edits: str | None) -> Edits | None:
    """Those of the run, from the file that it names, or where the user says that is now; UserError unless they are."""
    with damage_is_told(f"the run in {ledger.storage}", RESTORE):
        digest = ledger.run["identity"].get("edits")
        source = edits or ledger.run["description"].get("asked", {}).get("edits")
    if digest is None:
        if edits:
            raise UserError(f"the run in {ledger.storage} was made without edits; leave --edits out")
        return None
    if source is None:
        raise UserError(f"the run in {ledger.storage} was made under edits; say which with --edits")
    try:
        made = Edits.of(read_edits(source), model)
    except UserError as error:
        raise UserError(f"{error}; the run was made under it: say where it is now with --edits") from None
    if made.digest != digest:
        raise UserError(f"the edits of {source} are not those of the run; give --edits the file that it was made with")
    return made


_WRONG = (
    "give --model_path the model that the run was made with (of a hub model its hub id, at the same commit), and "
    "--adapter its adapter, if it had one"
)


def _gravest(reading: Reading, comparison: Comparison) -> str:
    if reading.damaged:
        return "damaged"
    if any(site.ok is False for site in comparison.sites):
        return "out of bounds"
    if reading.not_finite:
        return "not finite"
    return "unfinished" if reading.missing else "verified"


def _tell_reading(reading: Reading, terminal: Terminal) -> None:
    counts = reading.counts
    terminal.line(
        "read",
        f"{plural(counts['parts'], 'part')}, {plural(counts['files'], 'file')}, {bytes_text(counts['bytes'])}, "
        f"{plural(counts['blocks'], 'block')}{'' if reading.damaged else ': every checksum is right'}",
    )
    for thing in reading.damaged:
        terminal.line("damaged", thing)
    for thing in reading.missing:
        terminal.line("missing", thing)
    if reading.missing:
        terminal.line("", "the run is unfinished: the command that started it, given again, goes on")
    if reading.damaged and not reading.to_give_up:  # to compute again would not mend it
        terminal.line("mend", "restore what is damaged from a copy")
    for place in reading.to_give_up:
        terminal.line(
            "mend",
            f"restore what is damaged from a copy, or give its parts up with jax-extract sweep {place} --damaged: "
            "then the command that started the run computes them again",
        )


def _tell_not_finite(reading: Reading, terminal: Terminal) -> None:
    """One line a site that has such rows, and what to do about them."""
    for found in reading.not_finite.values():
        where = found.hook if found.layer is None else f"{found.hook} of layer {found.layer}"
        kinds = [(found.infinite, "infinite"), (found.undefined, "undefined")]
        values = " and ".join(f"{count:,} {kind}" for count, kind in kinds if count)
        named = found.first_samples[:_SAMPLES_NAMED]
        others = f" and {found.samples - len(named):,} more" if found.samples > len(named) else ""
        terminal.line(
            "warning",
            f"{where}: {plural(found.rows, 'row')} with {values} values, of {', '.join(map(repr, named))}{others}",
        )
    if not reading.not_finite:
        return
    if reading.layout.dtype == np.float16 and any(found.infinite for found in reading.not_finite.values()):
        terminal.line("mend", FLOAT16_ENDS)
    else:
        terminal.line("", "they were not made by rounding: the model itself computes such values")


def _tell_comparison(comparison: Comparison, reading: Reading, terminal: Terminal) -> None:
    """One line a site."""
    if not comparison.samples:
        for note in comparison.notes:
            terminal.line("note", note)
        return
    used, lengths = comparison.compared_with, [sample["tokens"] for sample in comparison.samples]
    chosen = f"{plural(len(lengths), 'sample')} of {min(lengths):,} to {max(lengths):,} tokens"
    terminal.line("compared", f"every row of {chosen} with {used['name']}")
    if used["judged_by"]:
        terminal.line("bounds", f"the worst and the median row of {used['judged_by']}, on the same samples")
    for note in comparison.notes:
        terminal.line("note", note)
    terminal.line("", f"{'hook point':<16} {'layer':>5} {'rows':>9}   {'worst':>7}  {'median':>7}   {'bound':>7}")
    for site in comparison.sites:
        layer = "" if site.layer is None else str(site.layer)
        bounds = "  ".join(f"{b:>7.1e}" for b in (site.bound, site.median_bound) if b is not None)
        judged = {True: "ok", False: "OUT OF BOUNDS", None: "not judged"}[site.ok]
        if (found := reading.not_finite.get((site.hook, site.layer))) and site.ok is not False:
            judged += f", but {plural(found.rows, 'row')} NOT FINITE"
        errors = f"{site.worst:>7.1e}  {site.median:>7.1e}"
        terminal.line("", f"{site.hook:<16} {layer:>5} {site.rows:>9,}   {errors}   {bounds}  {judged}")


def _tell_verdict(verdict: Verdict, terminal: Terminal) -> None:
    judged = verdict.sites and all(site.ok is not None for site in verdict.sites)
    bad = sum(found.rows for found in verdict.not_finite)
    rows = "the rows are the model's" if judged else "its rows were not judged"
    others = "the other rows are the model's" if judged else "the other rows were not judged"
    committed = f"every byte is as it was written, and {rows}" if verdict.read["parts"] else "there is nothing"
    told = {
        "verified": f"every byte is as it was written, and {rows}",
        "damaged": f"{plural(len(verdict.damaged), 'thing')}, named above",
        "out of bounds": some_of(site.name for site in verdict.sites if site.ok is False),
        "not finite": f"{plural(bad, 'row')} with infinite or undefined values, named above, are not vouched for; "
        f"every byte is as it was written, and {others}",
        "unfinished": f"parts are still to be computed; of what is committed, {committed}",
    }
    terminal.line("verdict", f"{verdict.verdict}: {told[verdict.verdict]}")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them, which knows no infinity."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
