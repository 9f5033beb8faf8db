"""One process of `test_invariance`: extracts on given meshes, and says how the program lies on them.

    JAX_NUM_CPU_DEVICES=8 python tests/mesh_worker.py FOLDER TEXTS.json OUT BATCH_SIZE 8,1 1,8 2,4

Writes OUT/rows_8x1.npz ("positions|sample|hook|layer" -> rows) for each mesh, and OUT/facts.json (mesh -> facts).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_extract import extract
from jax_extract.devices import compilation_cache
from jax_extract.devices.mesh import make_mesh
from jax_extract.extraction import jax_backend
from jax_extract.extraction.capture import capture_plan
from jax_extract.extraction.program import CaptureProgram
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel

COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
    r"|send|recv)(?:-start)?\("
)
ROWS, LENGTH = 2, 32
POSITIONS = {"all": ("*",), "from:7": ("after_block",), "mean_from:7": ("after_block",)}  # and the hook points


def program_on(model: OpenModel, mesh: Any) -> tuple[CaptureProgram, Any]:
    layers = range(model.config.num_hidden_layers)
    plan = capture_plan(model, layers, ("*",), "all", "float32")
    numerics = jax_backend.compute_numerics("float32")
    params = Weights(model.checkpoint, model.port, model.config, len(layers)).load(mesh, "float32")
    return CaptureProgram(model.port, model.config, params, plan, mesh, numerics), params


def flops(program: CaptureProgram, rows: int) -> float:
    """Of one device, for its `rows` rows."""
    costs = program.compiled(SlabShape(LENGTH, rows, 1)).cost_analysis()
    return float((costs[0] if isinstance(costs, list) else costs)["flops"])


def facts_of(model: OpenModel, shape: str) -> dict[str, Any]:
    """How the program lies on the mesh: captures, parameters, work and collectives."""
    program, params = program_on(model, jax_backend.open_mesh(shape))
    one, _ = program_on(model, make_mesh((1, 1), jax.devices()[:1]))
    tokens = np.ones((program.devices * ROWS, LENGTH), np.int32)
    captured = program.run(tokens, np.full((len(tokens), 1), LENGTH, np.int32))
    parameters = {
        "/".join(str(key.key) for key in path): {"whole": value.shape, "shard": value.addressable_shards[0].data.shape}
        for path, value in jax.tree_util.tree_leaves_with_path(params)
    }
    return {
        "captures": {
            hook: {
                "shards": len(array.addressable_shards),
                "distinct": len({str(shard.index) for shard in array.addressable_shards}),
                "shapes": sorted({shard.data.shape for shard in array.addressable_shards}),
                "whole": array.shape,
            }
            for hook, array in captured.items()
        },
        "parameters": parameters,
        "flops": flops(program, ROWS) * program.devices,
        "flops_of_one_device": flops(one, ROWS * program.devices),
        "collectives": sorted(set(COLLECTIVE.findall(program.compiled(SlabShape(LENGTH, ROWS, 1)).as_text()))),
    }


def main(folder: str, texts: str, out: str, batch_size: str, *meshes: str) -> None:
    compilation_cache.start()
    model = OpenModel.open(folder)
    facts: dict[str, Any] = {"devices": len(jax.devices())}
    for shape in meshes:
        rows = {}
        for positions, hook_points in POSITIONS.items():
            run = extract(
                folder,
                json.loads(Path(texts).read_text()),
                layers=range(model.config.num_hidden_layers),
                hook_points=hook_points,
                positions=positions,
                batch_size=int(batch_size),
                mesh_shape=shape,
            )
            rows |= {
                f"{positions}|{sample.sample_id}|{site.hook}|{site.layer}": sample.get(site.layer, site.hook)
                for sample in run.samples()
                for site in run.sites
            }
        np.savez(Path(out) / f"rows_{shape.replace(',', 'x')}.npz", **rows)
        facts[shape] = facts_of(model, shape)
    (Path(out) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
