"""Chooses how parameters lie on the mesh, from counts: products, bytes in memory, bytes between chips.

In: the shapes of a model's parameters, a mesh, a slab shape, the chip. Out: a `Decision`: the counts of every layout,
the one that is chosen and why. A layout never changes a row (`sharding`), so the choice is free; what is counted for
`tensor`, which would change rows and is not offered, says when it would have been the better one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jax_extract.devices.chips import Chip
from jax_extract.devices.mesh import DATA, MODEL
from jax_extract.devices.sharding import STACKED, Layout, cut_over, dotted
from models.accelerated_attention import computed_pairs
from models.ports import ModelConfig

SHARE_OF_PEAK = 0.5  # what real products reach of the published peak; stated with every figure that follows from it
MEMORY_MARGIN = 0.08  # of a chip's memory, kept free for the runtime and for what no count foresees
STEPS_HELD = 2  # captures of the step that computes, and of the one before, which is on its way to the host
_FLOAT32 = 4
TENSOR = "tensor"
_AS_GOOD = 1.02  # a step so much longer is no reason to move more


@dataclass(frozen=True)
class ModelCounts:
    """What a forward has, whatever it lies on.

    Attributes:
      blocks: that run.
      block_matrices: (outputs, inputs) of each matrix of one block.
      other_matrices: of those that every step needs once, such as the embedding.
      vector_values: in vectors, which every device keeps.
      widest: values a token has in the widest product of a block.
      held: values a token has in the products of a block that are held at once: parallel blocks hold two.
      d_model, d_ff, query_width: values a token has.
      heads, key_heads: of attention.
      value_bytes: of a stored parameter.
    """

    blocks: int
    block_matrices: tuple[tuple[int, int], ...]
    other_matrices: tuple[tuple[int, int], ...]
    vector_values: int
    widest: int
    held: int
    d_model: int
    d_ff: int
    query_width: int
    heads: int
    key_heads: int
    value_bytes: int

    @classmethod
    def of(cls, structure: Mapping[str, Any], config: ModelConfig, blocks: int) -> ModelCounts:
        """From the parameters as shapes, stacked where they belong to blocks."""
        in_block: list[tuple[int, int]] = []
        outside: list[tuple[int, int]] = []
        vectors, value_bytes = 0, 0
        for path, value in jax.tree_util.tree_leaves_with_path(structure):
            stacked = dotted(path).startswith(STACKED + ".")
            value_bytes = max(value_bytes, value.dtype.itemsize)
            shape = value.shape[1:] if stacked else value.shape
            if len(shape) == 1:
                vectors += math.prod(value.shape)
            else:
                (in_block if stacked else outside).append(shape)
        widest = max((outputs for outputs, _ in in_block), default=0)
        return cls(
            blocks=blocks,
            block_matrices=tuple(in_block),
            other_matrices=tuple(outside),
            vector_values=vectors,
            widest=widest,
            held=widest + config.parallel * (config.query_rows + 2 * config.num_key_value_heads * config.head_dim),
            d_model=config.hidden_size,
            d_ff=config.intermediate_size,
            query_width=config.query_rows,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            value_bytes=value_bytes,
        )

    @property
    def block_values(self) -> int:
        """In the matrices of one block."""
        return sum(outputs * inputs for outputs, inputs in self.block_matrices)

    @property
    def other_values(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.other_matrices)

    def product_flops(self, tokens: int) -> float:
        """Of the matrices: 2 m k n for [m, k] times [k, n], over all blocks."""
        return 2.0 * tokens * self.blocks * self.block_values

    def pair_flops(self, pairs: float) -> float:
        """Of so many pairs of a query and a key: once for the logits and once for the mix, over all blocks."""
        return 2.0 * 2.0 * self.blocks * self.query_width * pairs

    def attention_flops(self, rows: int, length: int, block: int = 1) -> float:
        """Of causal attention over whole rows, whosever the pairs are; `block` as `computed_pairs` takes it."""
        return self.pair_flops(rows * computed_pairs(length, block))

    def flops(self, rows: int, length: int, block: int = 1) -> float:
        return self.product_flops(rows * length) + self.attention_flops(rows, length, block)


@dataclass(frozen=True)
class Request:
    """What a layout is chosen for.

    Attributes:
      data, model: places of the mesh.
      rows, length: of one device's slab.
      capture_bytes: of one device and step.
      attention_block: attention computes pairs in squares of so many queries and keys.
    """

    counts: ModelCounts
    chip: Chip
    data: int
    model: int
    rows: int
    length: int
    capture_bytes: int
    attention_block: int = 1

    @property
    def flops(self) -> float:
        """Of one device and step."""
        return self.counts.flops(self.rows, self.length, self.attention_block)

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def places(self) -> dict[str, int]:
        """Of each mesh axis."""
        return {DATA: self.data, MODEL: self.model}


@dataclass(frozen=True)
class LayoutCost:
    """Of one device and one step.

    Attributes:
      stored: bytes of parameters kept.
      memory: bytes at the peak, estimated; the compiler has the last word.
      moved: bytes that arrive from other devices.
      compute_seconds: at the stated share of the peak.
      memory_seconds: that reading parameters and activations takes.
      moving_seconds: of what arrives while blocks compute.
      waiting_seconds: of what must arrive before the first block can.
      fits: whether the memory suffices, with the margin.
      refused: why it cannot be carried out, as half a sentence; None where it can.
    """

    name: str
    stored: float
    memory: float
    moved: float
    compute_seconds: float
    memory_seconds: float
    moving_seconds: float
    waiting_seconds: float
    fits: bool
    refused: str | None = None

    @property
    def seconds(self) -> float:
        """Of a step: a block's parameters arrive while the block before computes."""
        return self.waiting_seconds + max(self.compute_seconds, self.memory_seconds, self.moving_seconds)

    @property
    def bound(self) -> str:
        """What a step waits for most."""
        sizes = {
            "computing": self.compute_seconds,
            "memory": self.memory_seconds,
            "moving parameters": self.moving_seconds + self.waiting_seconds,
        }
        return max(sizes, key=lambda name: sizes[name])


@dataclass(frozen=True)
class Decision:
    """Attributes:
    layout: the chosen one.
    costs: of all that were counted, the chosen one's included.
    reason: half a sentence.
    """

    layout: Layout
    costs: tuple[LayoutCost, ...]
    reason: str

    @property
    def cost(self) -> LayoutCost:
        return next(cost for cost in self.costs if cost.name == self.layout.value)


def choose_layout(request: Request, share_of_peak: float = SHARE_OF_PEAK) -> Decision:
    """The layout with the shortest step among those that fit; of nearly equal ones, the one that moves least.

    Where none fits, the one that needs the least memory: a smaller batch may then fit.
    """
    costs = [layout_cost(layout, request, share_of_peak) for layout in _offered(request)]
    fitting = [cost for cost in costs if cost.fits]
    if fitting:
        shortest = min(cost.seconds for cost in fitting)
        best = min((cost for cost in fitting if cost.seconds <= _AS_GOOD * shortest), key=lambda cost: cost.moved)
        reason = _why(best)
    else:
        best = min(costs, key=lambda cost: cost.memory)
        reason = "none fits by the count; this one needs the least memory"
    tensor = [tensor_cost(request, share_of_peak)] if request.model > 1 else []
    return Decision(Layout(best.name), (*costs, *tensor), reason)


def layout_cost(layout: Layout, request: Request, share_of_peak: float = SHARE_OF_PEAK) -> LayoutCost:
    """Counts one layout of stored parameters; the batch lies on all devices in each."""
    counts, chip = request.counts, request.chip
    block, others = (_Bytes.of(m, layout, request) for m in (counts.block_matrices, counts.other_matrices))
    stored = counts.blocks * block.kept + others.kept + counts.vector_values * counts.value_bytes
    # A device at the end of a row of chips hears through one link an axis; slices of v5e below 16 x 16 have no rings.
    links = sum(request.places[axis] > 1 for axis in layout.axes)
    arriving = (counts.blocks * (block.gathered - block.pieces), others.gathered - others.pieces)
    speed = max(1, links) * chip.link_bytes_per_second
    working = _working_bytes(request, 2 * block.gathered, others.gathered)
    memory = stored + STEPS_HELD * request.capture_bytes + working
    return LayoutCost(
        name=layout.value,
        stored=stored,
        memory=memory,
        moved=sum(arriving),
        compute_seconds=request.flops / (share_of_peak * chip.peak_flops),
        # What was gathered is written and read once more.
        memory_seconds=(
            counts.blocks * (counts.block_values * counts.value_bytes + 2 * block.gathered)
            + _activation_traffic(request)
        )
        / chip.memory_bytes_per_second,
        moving_seconds=arriving[0] / speed,
        waiting_seconds=arriving[1] / speed,
        fits=memory <= (1 - MEMORY_MARGIN) * chip.memory_bytes,
    )


class _Bytes(NamedTuple):
    """Of some matrices on one device: what is kept, what of that are pieces, and what these are when gathered."""

    kept: float
    pieces: float
    gathered: float

    @classmethod
    def of(cls, matrices: Sequence[tuple[int, int]], layout: Layout, request: Request) -> _Bytes:
        kept = pieces = gathered = 0.0
        for outputs, inputs in matrices:
            size = outputs * inputs * request.counts.value_bytes
            axes = cut_over(outputs, layout, request.places)
            part = size / math.prod(request.places[axis] for axis in axes)
            kept += part
            pieces += part * bool(axes)
            gathered += size * bool(axes)
        return cls(kept, pieces, gathered)


def tensor_cost(request: Request, share_of_peak: float = SHARE_OF_PEAK) -> LayoutCost:
    """Heads and FFN columns spread over `model`, whose devices compute the same rows together.

    After attention and after the FFN each of them holds a partial sum of every row of the group, in float32; an
    all-reduce makes every device hear it 2 (m - 1) / m times.
    """
    counts, chip, m = request.counts, request.chip, request.model
    stored = (counts.blocks * counts.block_values + counts.other_values) * counts.value_bytes / m
    stored += counts.vector_values * counts.value_bytes
    moved = counts.blocks * 2 * 2 * (m - 1) / m * m * request.tokens * counts.d_model * _FLOAT32
    memory = stored + STEPS_HELD * request.capture_bytes + _working_bytes(request, 0, 0)
    return LayoutCost(
        name=TENSOR,
        stored=stored,
        memory=memory,
        moved=moved,
        compute_seconds=request.flops / (share_of_peak * chip.peak_flops),
        memory_seconds=(counts.blocks * counts.block_values * counts.value_bytes / m + _activation_traffic(request))
        / chip.memory_bytes_per_second,
        moving_seconds=0.0,
        waiting_seconds=moved / chip.link_bytes_per_second,  # the next product needs the sum
        fits=memory <= (1 - MEMORY_MARGIN) * chip.memory_bytes,
        refused=_why_not_tensor(counts, m),
    )


def tensor_wins_below(counts: ModelCounts, model: int) -> float:
    """Tokens a device below which sums of activations are fewer bytes than a block's parameters."""
    return counts.block_values * counts.value_bytes / (2 * 2 * model * counts.d_model * _FLOAT32)


def _offered(request: Request) -> Sequence[Layout]:
    """Every layout that differs from the others on this mesh."""
    layouts = [Layout.REPLICATED]
    if request.model > 1:
        layouts.append(Layout.GATHERED)
    if request.data > 1:
        layouts.append(Layout.GATHERED_BOTH)
    return layouts


def _working_bytes(request: Request, gathered_blocks: float, gathered_others: float) -> float:
    """Temporaries: the embedding while it is looked up, or two gathered blocks and a block's widest activations."""
    counts, tokens = request.counts, request.tokens
    stream = tokens * counts.d_model * _FLOAT32
    held = tokens * (counts.held * _FLOAT32 + counts.d_ff * counts.value_bytes)
    return stream + max(gathered_others, gathered_blocks + held + stream)


def _activation_traffic(request: Request) -> float:
    """Bytes that a step writes and reads between products: each one's operands and results, once."""
    counts = request.counts
    values = 6 * counts.d_model + 2 * counts.widest + 2 * counts.d_ff + 4 * counts.query_width
    return request.counts.blocks * request.tokens * values * _FLOAT32 + 2 * request.capture_bytes


def _why(best: LayoutCost) -> str:
    if best.name == Layout.REPLICATED.value:  # which always wins where it fits
        return "the parameters fit whole, and nothing has to move"
    hidden = "hides behind computing" if best.moving_seconds <= best.compute_seconds else "does not hide entirely"
    return f"the parameters do not fit whole; of steps of nearly one length the least moves, and it {hidden}"


def _why_not_tensor(counts: ModelCounts, model: int) -> str:
    odd = [
        f"{size} {what}"
        for what, size in (("heads", counts.heads), ("key/value heads", counts.key_heads), ("FFN columns", counts.d_ff))
        if size % model
    ]
    told = "sums over devices would change rows, and activations would cross devices"
    return told + (f"; {' and '.join(odd)} do not divide by {model} either" if odd else "")
