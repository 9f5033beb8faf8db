#!/usr/bin/env python3
"""Fills in jobset.yaml, the description of an extraction on GKE.

    python launch/gke/render_jobset.py --name activations-1 --image IMAGE \\
        --activations_dir gs://bucket/run -- --model_path Qwen/Qwen2.5-0.5B --dataset NAME > jobset.yaml

In: the template beside this file, flags, and after `--` the flags of `jax-extract extract`. Out: YAML for
`kubectl apply`. Values are put into the parsed document, never into its text, so none can become YAML.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

TEMPLATE = Path(__file__).with_name("jobset.yaml")
CHIPS_A_POD = 4  # of the machine type ct5lp-hightpu-4t
DATA_FOLDER = "/data"

# Pods are called NAME-extract-0-INDEX-xxxxx, in at most 63 characters.
_NAME = (r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "a name of at most 40 lower-case letters, digits and hyphens")
_SHAPES = {
    "name": _NAME,
    "namespace": _NAME,
    "service_account": (r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "the name of a Kubernetes service account"),
    "image": (r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,510}", "the name of a container image"),
    "activations_dir": (
        r"gs://[a-z0-9][a-z0-9._-]{1,220}(/[^\x00-\x1f\x7f]*)?",
        "a place in a bucket: gs://bucket/prefix",
    ),
    "mesh_shape": (r"auto|[1-9][0-9]*,[1-9][0-9]*", "DATA,MODEL, such as 8,8"),
    "topology": (r"[1-9][0-9]?x[1-9][0-9]?", "a TPU topology, such as 8x8"),
    "accelerator": (r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a TPU accelerator, such as tpu-v5-lite-podslice"),
    "data_bucket": (r"[a-z0-9][a-z0-9._-]{1,220}", "the name of a bucket, without gs://"),
}
_DECIDED_HERE = {
    "activations_dir": "give it before --",
    "mesh_shape": "give it before --",
    "num_workers": "it is --workers, before --",
    **dict.fromkeys(
        ("worker_id", "distributed", "coordinator_address", "num_processes", "process_id"),
        "it is decided by --mode; leave it out",
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse(f"{message}; {self.prog} --help lists the flags")


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:split])
    extract = words[split + 1 :]
    _check(options, extract)
    text = yaml.safe_dump(render(options, extract), sort_keys=False, width=1_000)
    if options.output:
        Path(options.output).write_text(text)
    else:
        print(text, end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="render_jobset.py",
        description="The description of an extraction on GKE; flags of jax-extract extract follow after --.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet")
    add("--image", required=True, help="container image with the project")
    add("--activations_dir", required=True, help="where the run is written: gs://bucket/prefix")
    add("--mode", choices=("spmd", "workers"), default="spmd", help="one program over a slice, or independent pods")
    add("--topology", help="of the node pool; 8x8 in spmd mode, 2x2 in workers mode")
    add("--mesh_shape", help="DATA,MODEL; the topology in spmd mode; auto leaves it to the program")
    add("--workers", type=int, default=16, help="in workers mode: how many pods of four chips")
    add("--accelerator", default="tpu-v5-lite-podslice", help="kind of TPU of the node pool")
    add("--spot", choices=("True", "False"), default="True", help="whether the node pool is of Spot VMs")
    add("--max_restarts", type=int, default=10, help="how often lost pods are replaced at most")
    add("--namespace", default="default", help="of Kubernetes")
    add("--service_account", default="default", help="Kubernetes service account that may write to the bucket")
    add("--data_bucket", help=f"bucket with models and inputs, mounted at {DATA_FOLDER} for reading")
    add("--privileged", choices=("True", "False"), default="False", help="needed by GKE before 1.28 alone")
    add("--output", help="file to write; the standard output where it is left out")
    return parser


def _check(options: argparse.Namespace, extract: list[str]) -> None:
    for name, (pattern, what) in _SHAPES.items():
        value = getattr(options, name)
        if value is not None and not re.fullmatch(pattern, value):
            _refuse(f"--{name} {value!r} is not {what}")
    if options.workers < 1 or options.max_restarts < 0:
        _refuse(f"--workers {options.workers} must be from 1 and --max_restarts {options.max_restarts} from 0")
    for word in extract:
        flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and flag in _DECIDED_HERE:
            _refuse(f"--{flag} after -- is not for here; {_DECIDED_HERE[flag]}")
    chips = _chips(options)
    if chips % CHIPS_A_POD:
        _refuse(f"--topology {options.topology} has {chips} chips, no multiple of the {CHIPS_A_POD} of a pod")
    if options.mode == "workers" and chips != CHIPS_A_POD:
        _refuse(f"--topology {options.topology} spans several VMs, but workers are single ones; choose 2x2")


def render(options: argparse.Namespace, extract: list[str]) -> dict[str, Any]:
    """The JobSet as a document."""
    document = yaml.safe_load(TEMPLATE.read_text())
    document["metadata"].update(name=options.name, namespace=options.namespace)
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    pod["serviceAccountName"] = options.service_account
    pod["nodeSelector"] |= {
        "cloud.google.com/gke-tpu-accelerator": options.accelerator,
        "cloud.google.com/gke-tpu-topology": _topology(options),
    }
    container["image"] = options.image
    container["resources"]["limits"]["google.com/tpu"] = CHIPS_A_POD
    if options.spot == "True":
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"].append({"key": "cloud.google.com/gke-spot", "operator": "Exists"})
    if options.privileged == "True":
        container["securityContext"] = {"privileged": True}
    if options.data_bucket:
        _mount(options.data_bucket, job["template"], container)
    share = _share_of_workers if options.mode == "workers" else _share_of_spmd
    container["args"] = ["--activations_dir", options.activations_dir, *share(options, document, job, container)]
    container["args"] += [_literal(word) for word in extract]
    return document


def _share_of_spmd(options: argparse.Namespace, document: dict, job: dict, container: dict) -> list[str]:
    """One program: all pods or none; a lost one restarts the set."""
    job["parallelism"] = job["completions"] = _chips(options) // CHIPS_A_POD
    document["spec"]["failurePolicy"]["maxRestarts"] = options.max_restarts
    mesh = options.mesh_shape or _topology(options).replace("x", ",")
    return ["--distributed", "on", *(() if mesh == "auto" else ("--mesh_shape", mesh))]


def _share_of_workers(options: argparse.Namespace, document: dict, job: dict, container: dict) -> list[str]:
    """Each pod for itself: lost ones are replaced, and the others do not notice."""
    job["parallelism"] = job["completions"] = options.workers
    job["backoffLimit"] = options.max_restarts
    # A preempted pod is not the command's fault and does not count.
    job["podFailurePolicy"]["rules"].append(
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    )
    document["spec"]["failurePolicy"]["maxRestarts"] = 0
    del document["metadata"]["annotations"]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    container["env"].append({"name": "WORKER_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}})
    mesh = options.mesh_shape or "auto"
    words = ["--distributed", "off", "--worker_id", "$(WORKER_ID)", "--num_workers", str(options.workers)]
    return words + ([] if mesh == "auto" else ["--mesh_shape", mesh])


def _mount(bucket: str, template: dict, container: dict) -> None:
    """The bucket as a read-only folder, by the Cloud Storage FUSE driver of GKE."""
    template.setdefault("metadata", {}).setdefault("annotations", {})["gke-gcsfuse/volumes"] = "true"
    attributes = {"bucketName": bucket, "mountOptions": "implicit-dirs"}
    driver = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": attributes}
    template["spec"]["volumes"] = [{"name": "data", "csi": driver}]
    container["volumeMounts"] = [{"name": "data", "mountPath": DATA_FOLDER, "readOnly": True}]


def _topology(options: argparse.Namespace) -> str:
    return options.topology or ("2x2" if options.mode == "workers" else "8x8")


def _chips(options: argparse.Namespace) -> int:
    return math.prod(int(side) for side in _topology(options).split("x"))


def _literal(word: str) -> str:
    """Kubernetes puts variables in for `$(NAME)`; a user's word means itself."""
    return word.replace("$(", "$$(")


def _refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
