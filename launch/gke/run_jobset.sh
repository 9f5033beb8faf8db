#!/usr/bin/env bash
# Runs an extraction on GKE as a JobSet, which starts it again after preemptions by itself.
#
# In: an image, a cluster that kubectl points to, flags of the extraction. Out: the manifest, as a file that also
# deletes the job again, and the job in the cluster.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"

name='' image='' activations_dir='' mode=spmd topology='' mesh_shape='' workers=16 spot=True max_restarts=10
namespace=default service_account=default data_bucket='' accelerator=tpu-v5-lite-podslice privileged=False manifest=''
about='Runs jax-extract extract on GKE as a JobSet.
--mode spmd: one program over a multi-host slice. --mode workers: independent pods of four chips.'
rest_is='flags of jax-extract extract'
flags=(
  'name of the JobSet'
  'image container image with the project (launch/gke/Dockerfile)'
  'activations_dir where the run is written: gs://bucket/prefix'
  'mode spmd or workers'
  'topology of the node pool; 8x8 in spmd mode, 2x2 in workers mode'
  'mesh_shape DATA,MODEL; the topology in spmd mode, all chips of a pod on DATA in workers mode'
  'workers in workers mode: how many pods'
  'spot whether the node pool is of Spot VMs'
  'max_restarts how often lost pods are replaced at most'
  'namespace of Kubernetes'
  'service_account Kubernetes service account that may write to the bucket'
  'data_bucket bucket with models and inputs, mounted at /data for reading'
  'accelerator kind of TPU of the node pool'
  'privileged needed by GKE before 1.28 alone'
  'manifest file for the manifest; NAME.jobset.yaml in this folder where it is left out'
)
read_flags "$@"
need name image activations_dir
check_names name namespace
check_bucket_place activations_dir
check manifest '[^-].*' 'the name of a file'
require_command kubectl 'install it (gcloud components install kubectl)'
manifest=${manifest:-$name.jobset.yaml}

python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
words=("$python" "$here/render_jobset.py" "--output=$manifest" "--name=$name" "--image=$image")
words+=("--activations_dir=$activations_dir" "--mode=$mode" "--workers=$workers" "--spot=$spot")
words+=("--max_restarts=$max_restarts" "--namespace=$namespace" "--service_account=$service_account")
words+=("--accelerator=$accelerator" "--privileged=$privileged")
[[ -z $topology ]] || words+=("--topology=$topology")
[[ -z $mesh_shape ]] || words+=("--mesh_shape=$mesh_shape")
[[ -z $data_bucket ]] || words+=("--data_bucket=$data_bucket")
run "${words[@]}" -- "${rest[@]}"
run kubectl apply "--filename=$manifest"
pods="--namespace $namespace --selector jobset.sigs.k8s.io/jobset-name=$name"
say "watch it: kubectl get pods $pods"
say "read it: kubectl logs --follow --max-log-requests=64 $pods"
say "end it: kubectl delete --filename=$(quoted "$manifest")"
