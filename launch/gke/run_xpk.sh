#!/usr/bin/env bash
# Runs an extraction on a GKE cluster that xpk made, as one program over a slice.
#
# In: an image, the cluster, flags of the extraction. Out: a workload in the cluster's queue. Independent workers
# are run_jobset.sh --mode workers.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"

project='' zone='' cluster='' name='' image='' activations_dir='' tpu_type=v5litepod-64 mesh_shape=8,8 max_restarts=10
priority=medium
about='Runs jax-extract extract as an xpk workload: one program over all chips of a slice.'
rest_is='flags of jax-extract extract'
flags=(
  'project the Google Cloud project'
  'zone the zone of the cluster, such as us-west4-a'
  'cluster that xpk cluster create made'
  'name of the workload'
  'image container image with the project (launch/gke/Dockerfile)'
  'activations_dir where the run is written: gs://bucket/prefix'
  'tpu_type kind and size of the slice'
  'mesh_shape DATA,MODEL; auto leaves it to the program'
  'max_restarts how often the workload is started again at most'
  'priority very-low, low, medium, high or very-high'
)
read_flags "$@"
need project zone cluster name image activations_dir
check project '[a-z][a-z0-9:.-]{4,61}[a-z0-9]' 'the id of a project'
check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone, such as us-west4-a'
check_names cluster
check name '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' 'a name of at most 40 lower-case letters, digits and hyphens'
check image '[A-Za-z0-9][A-Za-z0-9._:/@-]*' 'the name of a container image'
check_bucket_place activations_dir
check tpu_type '[a-z0-9]+-[0-9]+' 'a TPU type, such as v5litepod-64'
check mesh_shape 'auto|[1-9][0-9]*,[1-9][0-9]*' 'DATA,MODEL, such as 8,8'
check max_restarts '[0-9]{1,4}' 'a whole number from 0'
check priority 'very-low|low|medium|high|very-high' 'a priority; choose very-low, low, medium, high or very-high'
require_command xpk 'install it (pip install xpk)'

words=(jax-extract extract --activations_dir "$activations_dir" --distributed on)
[[ $mesh_shape == auto ]] || words+=(--mesh_shape "$mesh_shape")
# xpk writes the command into the text of a manifest, within a script.
[[ "${rest[*]}" != *[$'\n\r']* ]] || refuse 'a word after -- has a line break; xpk cannot pass it on, run_jobset.sh can'
# exec: the program itself gets the SIGTERM. Exit code 1, a crash, is worth another start; 2, a mistake, is not.
run xpk workload create "--workload=$name" "--cluster=$cluster" "--project=$project" "--zone=$zone" \
  "--tpu-type=$tpu_type" --num-slices=1 "--docker-image=$image" "--priority=$priority" \
  "--max-restarts=$max_restarts" --restart-on-exit-codes=1 --termination-grace-period-seconds=30 \
  --env=TQDM_MININTERVAL=30 \
  "--command=exec $(quoted "${words[@]}" "${rest[@]}")"
