"""What a run's rows should be, and how far the stored ones are from that.

In: an opened model, stored samples with their token ids. Out: the true rows of each site, each sample
computed by itself, without batch, padding or mesh, in float32, a bounded group of sites at a time; row
errors of what is stored, and what they may be. The reference is Hugging Face's model in torch where torch is
installed, reading the weights itself where it can; else our own forward on one CPU device, which shares the
port with the run, but not its batches, padding, mesh or dtype.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jax_extract.devices.mesh import make_mesh
from jax_extract.errors import UserError
from jax_extract.store.parts import Site
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import PATTERN_TOKENS, CapturePlan
from models.decoder import Decoder
from models.hooks import HOOK_POINTS
from models.interventions import Intervention
from models.layers import LONGEST_SUM, Numerics
from models.packing import Packing
from models.ports import ModelConfig, Module, Parameters, Port
from models.positions import MEAN_POSITION, Positions

SiteKey = tuple[str, int | None]  # hook point, layer
Rows = Iterator[tuple[Site, np.ndarray]]
Tell = Callable[[str], None]

# What the project promises of float32 (tests/test_parity.py holds it): on the residual stream, and elsewhere.
RESIDUAL_BOUND, OTHER_BOUND = 1e-5, 5e-5

GROUP_BYTES = 512 << 20  # of rows that are computed in one pass and held at once
_VALUES_AT_ONCE = 1 << 20  # that row errors are taken of


class Reference(Protocol):
    """Attributes:
    name: what computes, in words.
    versions: of the libraries that do.
    """

    @property
    def name(self) -> str: ...
    @property
    def versions(self) -> Mapping[str, str]: ...

    def rows(self, sample: Wanted, sites: Sequence[Site]) -> Rows:
        """One sample's rows, site by site in the order given.

        Yields:
          (site, float32 [rows, width]); means are taken, and given, in float64.
        """
        ...


@dataclass(frozen=True, eq=False)
class Wanted:
    """Rows of one sample.

    The model is causal, so a sample's beginnings are samples themselves, computed along with it: rows that a
    run would have stored of them are further rows of the same kind. (Where rotations depend on a sample's length they
    have those of the whole sample, which changes nothing of how well they are computed.)

    Attributes:
      token_ids: int32 [tokens], exactly what the model sees.
      positions: int32 [stored], the token position of each stored row; -1 alone stands for a mean.
      beginnings: int [more], the last position of each beginning whose `last` row (or mean) follows those rows.
      begins: the position before which a run stores nothing, and at which means begin.
      changes: interventions of the sample, in a batch of its own.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    beginnings: np.ndarray
    begins: int = 0
    changes: tuple[Intervention, ...] = ()

    @classmethod
    def of(cls, token_ids: np.ndarray, positions: np.ndarray, beginnings: int, begins: int = 0) -> Wanted:
        """At most so many beginnings, of lengths spread evenly, each long enough for a row."""
        last = np.linspace(begins, len(token_ids) - 1, min(beginnings, len(token_ids) - begins))
        return cls(token_ids, positions, np.unique(last.astype(np.int64)), begins)

    @property
    def count(self) -> int:
        return len(self.positions) + len(self.beginnings)

    def select(self, values: np.ndarray) -> np.ndarray:
        """values [tokens, width] -> rows [count, width]."""
        if self.positions.tolist() != [MEAN_POSITION]:
            return values[np.concatenate([self.positions, self.beginnings])]
        sums = np.cumsum(values[self.begins :], axis=0, dtype=np.float64)
        last = np.append([len(values) - 1], self.beginnings) - self.begins
        return sums[last] / (last + 1)[:, None]


@dataclass(frozen=True)
class References:
    """What a run is compared with.

    A bfloat16 run computes with weights rounded to bfloat16, and so does its peer: the truth of both is
    float32 arithmetic on these weights, so that they differ from it, and are judged, by their arithmetic alone.

    Attributes:
      truth: float32.
      peer: Hugging Face in bfloat16, where it is wanted and can be had.
    """

    truth: Reference
    peer: Reference | None = None

    @classmethod
    def open(cls, model: OpenModel, sites: Sequence[Site], computed_in: str, tell: Tell) -> References | None:
        """The most independent ones there are here; `tell` hears why they are not the first choice.

        None where no port computes the model, and transformers cannot here either.
        """
        instead = "the reference is our own forward" if isinstance(model.family, Port) else "its rows were not checked"
        if not torch_is_installed():
            tell(f"torch is not installed, so {instead}")
        elif truth := _open_torch(model, sites, computed_in, "float32", tell):
            half = computed_in == "bfloat16"
            return cls(truth, _open_torch(model, sites, computed_in, computed_in, lambda _: None) if half else None)
        return cls(OwnForward(model, sites, computed_in)) if isinstance(model.family, Port) else None


def torch_is_installed() -> bool:
    return importlib.util.find_spec("torch") is not None


def grouped(sites: Iterable[Site], rows: int) -> Iterator[list[Site]]:
    """The sites in order, as many at a time as may be held with `rows` float32 rows each; at least one."""
    group: list[Site] = []
    for site in sites:
        if group and sum(s.width for s in (*group, site)) * rows * 4 > GROUP_BYTES:
            yield group
            group = []
        group.append(site)
    if group:
        yield group


# ------------------------------------------------------------------------------------------- Hugging Face


class HuggingFace:
    """Hugging Face's model on the CPU, read through forward hooks."""

    def __init__(self, model: Any, config: ModelConfig, name: str, modules: Mapping[str, Module]) -> None:
        self.name = name
        self._config = config
        self.versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
        self._model = model
        self._modules = modules

    def rows(self, sample: Wanted, sites: Sequence[Site]) -> Rows:
        for group in grouped(sites, sample.count):
            found = self._captured(sample, group)
            for site in group:
                yield site, found.pop(site.key)

    def _captured(self, sample: Wanted, sites: Sequence[Site]) -> dict[SiteKey, np.ndarray]:
        import torch

        from jax_extract.pytorch.changing import changed
        from jax_extract.pytorch.hooks import listen
        from jax_extract.pytorch.loading import forget_lengths

        found: dict[SiteKey, np.ndarray] = {}
        pattern_tokens = plan_of(sites, self._config).pattern_tokens

        def keep(key: SiteKey, value: torch.Tensor) -> None:
            found[key] = sample.select(value[0].float().numpy())  # a copy: the model may write over its own

        with contextlib.ExitStack() as hooks:
            for site in sites:
                see = partial(keep, site.key)
                handle = listen(self._model, self._modules[site.hook], site.layer, see, pattern_tokens)
                hooks.callback(handle.remove)
            forget_lengths(self._model)
            hooks.enter_context(changed(self._model, self._modules, sample.changes))
            with torch.inference_mode():
                self._model(input_ids=torch.from_numpy(sample.token_ids.astype(np.int64))[None], use_cache=False)
        return found


def _open_torch(model: OpenModel, sites: Sequence[Site], weights: str, dtype: str, tell: Tell) -> HuggingFace | None:
    """Weights rounded to one dtype, computed with in another; None where that cannot be had.

    The weights are as transformers reads them; where it cannot, as we do.
    """
    import torch

    from jax_extract.pytorch.loading import hooked_modules, load_ours, load_theirs, quiet

    layers = _blocks_of(sites, model.config.num_hidden_layers)
    name = _name("Hugging Face transformers", weights, dtype)
    ways = [
        (load_theirs, "", "its weights are read by jax_extract"),
        (load_ours, ", weights read by jax_extract", "the reference is our own forward"),
    ]
    if not isinstance(model.family, Port):
        tell("no port computes this model: the reference is transformers as well, a sample at a time")
        ways = [(load_theirs, "", "its rows were not checked")]
    elif adapter := model.checkpoint.adapter:
        tell(f"the weights are merged with the adapter {adapter} by jax_extract")
        ways = ways[1:]
    for load, whose, instead in ways:
        try:
            with quiet():
                loaded = load(model, layers, getattr(torch, weights)).to(getattr(torch, dtype))
                return HuggingFace(loaded, model.config, name + whose, hooked_modules(loaded, model))
        except Exception as error:  # noqa: BLE001 (whatever a library of models raises, there is another reference)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            tell(f"transformers does not load this model{whose} ({reason.rstrip('.')}), so {instead}")
    return None


def _name(whose: str, weights: str, dtype: str) -> str:
    return f"{whose} in {dtype}" + ("" if weights == dtype else f" on weights rounded to {weights}")


def _blocks_of(sites: Sequence[Site], num_layers: int) -> int:
    """How many blocks a model needs so that every site can be hooked; at least one."""
    if any(site.hook == "final_norm" for site in sites):
        return num_layers
    return max((site.layer + 1 for site in sites if site.layer is not None), default=1)


# -------------------------------------------------------------------------------------- our own forward


class OwnForward:
    """Our port on one CPU device: a sample a call, float32, no padding, all positions."""

    def __init__(self, model: OpenModel, sites: Sequence[Site], weights: str) -> None:
        self.name = _name("jax_extract's own forward, unbatched,", weights, "float32")
        self.versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib")}
        self._model = model
        mesh = make_mesh((1, 1), _one_cpu_device())
        self._device = mesh.devices.flat[0]
        blocks = plan_of(sites, model.config).blocks_needed(model.config.num_hidden_layers)
        params = Weights(model.checkpoint, model.port, model.config, blocks).load(mesh, weights)
        self._params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        self._programs: dict[CapturePlan, Callable[..., dict[str, jax.Array]]] = {}

    def rows(self, sample: Wanted, sites: Sequence[Site]) -> Rows:
        tokens = jax.device_put(sample.token_ids.astype(np.int32)[None], self._device)
        for group in grouped(sites, len(sample.token_ids)):
            plan = plan_of(group, self._model.config)
            if plan not in self._programs:
                self._programs[plan] = jax.jit(self._forward(plan))
            captured = self._programs[plan](self._params, tokens, sample.changes)
            arrays = {hook: np.asarray(array) for hook, array in captured.items()}
            for site in group:
                yield site, sample.select(arrays[site.hook][plan.slot(*site.key), 0])

    def _forward(self, plan: CapturePlan) -> Callable[..., dict[str, jax.Array]]:
        numerics = Numerics("float32", longest_sum=LONGEST_SUM)
        decoder = Decoder(self._model.port, self._model.config, numerics)

        def forward(params: Parameters, tokens: jax.Array, changes: tuple[Intervention, ...]) -> dict[str, jax.Array]:
            packing = Packing(jnp.full((1, 1), tokens.shape[1], jnp.int32), tokens.shape[1])
            return decoder.capture(params, tokens, packing, plan, changes)

        return forward


def plan_of(sites: Iterable[Site], config: ModelConfig) -> CapturePlan:
    """Every position of these sites, in float32."""
    layers: dict[str, set[int]] = {}
    pattern_tokens = PATTERN_TOKENS
    for site in sites:
        if site.hook == "attention_pattern":
            pattern_tokens = site.width // config.num_attention_heads
        layers.setdefault(site.hook, set()).update([] if site.layer is None else [site.layer])
    if strange := sorted(set(layers) - set(HOOK_POINTS)):
        raise UserError(f"the run holds the hook point {strange[0]!r}, which this version does not know; update it")
    captures = tuple((hook, tuple(sorted(layers[hook]))) for hook in HOOK_POINTS if hook in layers)
    return CapturePlan(captures, Positions("all"), "float32", pattern_tokens)


def _one_cpu_device() -> list[Any]:
    try:
        return jax.devices("cpu")[:1]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
        return jax.devices()[:1]


# --------------------------------------------------------------------------------------------- row errors


def row_errors(stored: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far stored rows are from the truth: ‖a−b‖₂/‖b‖₂, absolute where b is zero.

    Args:
      stored: [rows, width], float32, float16 or bfloat16.
      truth: [rows, width], float32 or float64.

    Returns:
      float64 [rows] twice: the error as stored, and the error that rounding to 16 bits does not explain.
      The latter is the distance to the nearest row that rounds to the stored bits, hence at most the error
      of the row before it was rounded; docs/verify.md derives it. Of float32 the two are the same.
    """
    as_stored, unexplained = np.empty(len(stored)), np.empty(len(stored))
    step = max(1, _VALUES_AT_ONCE // max(1, stored.shape[1]))
    for start in range(0, len(stored), step):
        some = slice(start, start + step)
        as_stored[some], unexplained[some] = _row_errors(stored[some], truth[some].astype(np.float64))
    return as_stored, unexplained


def _row_errors(stored: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = stored.astype(np.float64)
    agrees = (values == truth) | (np.isnan(values) & np.isnan(truth))  # infinite alike, too
    norm = np.linalg.norm(np.where(np.isfinite(truth), truth, 0.0), axis=1)
    norm[norm == 0] = 1.0

    def relative(difference: np.ndarray) -> np.ndarray:
        distance = np.where(agrees, 0.0, difference)
        return np.linalg.norm(np.where(np.isnan(distance), np.inf, distance), axis=1) / norm

    with np.errstate(invalid="ignore", over="ignore"):
        as_stored = relative(values - truth)
        if stored.dtype.itemsize > 2:  # noqa: PLR2004 (bytes of bfloat16 and float16)
            return as_stored, as_stored
        low, high = rounding_interval(stored)
        return as_stored, relative(np.maximum(0.0, np.maximum(low - truth, truth - high)))


def rounding_interval(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 (low, high): what rounds to a stored 16-bit value lies between, halfway to its neighbours.

    Neighbours of a subnormal are as far apart as subnormals are. Infinity is what lies beyond halfway from
    the largest number to what would be the next one.
    """
    infinity = np.array(np.inf, stored.dtype)
    largest = np.nextafter(infinity, -infinity)
    next_one = 2 * float(largest) - float(np.nextafter(largest, -infinity))

    def number(array: np.ndarray) -> np.ndarray:
        return np.clip(array.astype(np.float64), -next_one, next_one)

    with np.errstate(invalid="ignore", over="ignore"):
        below, middle, above = map(number, (np.nextafter(stored, -infinity), stored, np.nextafter(stored, infinity)))
        low = np.where(stored == -infinity, -np.inf, (below + middle) / 2)
        high = np.where(stored == infinity, np.inf, (middle + above) / 2)
    return low, high


@dataclass(frozen=True)
class SiteVerdict:
    """How far the rows of one hook point and layer are from the reference, over all samples computed again.

    Attributes:
      rows: how many were compared.
      worst, median: of the row errors, without what rounding to 16 stored bits explains.
      worst_as_stored: with it.
      bound, median_bound: what worst and median may be; None where nothing is promised.
    """

    hook: str
    layer: int | None
    rows: int
    worst: float
    median: float
    worst_as_stored: float
    bound: float | None
    median_bound: float | None

    @property
    def ok(self) -> bool | None:
        """None where nothing was judged."""
        if self.bound is None:
            return None
        return self.worst <= self.bound and (self.median_bound is None or self.median <= self.median_bound)

    @property
    def name(self) -> str:
        return self.hook if self.layer is None else f"{self.hook} of layer {self.layer}"


def _finite(blocks: Sequence[np.ndarray]) -> np.ndarray:
    errors = np.concatenate(blocks)
    return errors[np.isfinite(errors)]


@dataclass
class SiteErrors:
    """Gathers the row errors of one site, a block a sample."""

    as_stored: list[np.ndarray] = field(default_factory=list)
    unexplained: list[np.ndarray] = field(default_factory=list)
    theirs: list[np.ndarray] = field(default_factory=list)
    theirs_further: list[np.ndarray] = field(default_factory=list)

    def add(self, stored: np.ndarray, truth: np.ndarray, peer: np.ndarray | None) -> None:
        """Rows as stored, as they should be, and as the peer has them; the latter two may have further ones."""
        as_stored, unexplained = row_errors(stored, truth[: len(stored)])
        self.as_stored.append(as_stored)
        self.unexplained.append(unexplained)
        if peer is not None:
            with np.errstate(over="ignore"):  # stored as ours are: what overflows of ours overflows of theirs
                same_dtype = peer.astype(np.float32).astype(stored.dtype)
            _, errors = row_errors(same_dtype, truth)
            errors[~np.isfinite(same_dtype.astype(np.float32)).all(axis=1)] = np.inf
            self.theirs.append(errors[: len(stored)])
            self.theirs_further.append(errors[len(stored) :])

    def verdict(self, site: Site, computed_in: str) -> SiteVerdict:
        """A float32 run has the project's bounds; a bfloat16 run the errors of the peer, if there is one."""
        bound = RESIDUAL_BOUND if HOOK_POINTS[site.hook].residual_stream else OTHER_BOUND
        median_bound = None
        if computed_in != "float32" and self.theirs:
            # Where the peer happens to be exact (embeddings), what is promised of float32 is near enough.
            # A row of theirs that overflows is no measure: an infinite bound would let everything pass.
            theirs, further = (_finite(errors) for errors in (self.theirs, [*self.theirs, *self.theirs_further]))
            median_bound = max(bound, float(np.median(theirs))) if len(theirs) else bound
            bound = max(bound, float(further.max(initial=0.0)))
        errors = np.concatenate(self.unexplained)
        return SiteVerdict(
            hook=site.hook,
            layer=site.layer,
            rows=len(errors),
            worst=float(errors.max()),
            median=float(np.median(errors)),
            worst_as_stored=float(np.concatenate(self.as_stored).max()),
            bound=bound if computed_in == "float32" or self.theirs else None,
            median_bound=median_bound,
        )
