#!/usr/bin/env bash
# Runs an extraction on all VMs of a slice and shows what they say.
#
# In: a slice that is set up, where to write, flags of the extraction. Out: a run in the bucket; the exit code is 0
# when every VM ended well, else that of the first one that did not. The extraction does not depend on this
# terminal: the VMs go on without it, and the same --run_id finds it again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"
# shellcheck source=launch/tpu_pod/slice.sh
source "$here/slice.sh"

mode=spmd activations_dir='' mesh_shape='' num_workers='' worker_offset=0 chip_bounds=2,2,1
run_id='' replace=False stop=False
about='Runs jax-extract extract on all VMs of a slice.
--mode spmd: one program over all chips. --mode workers: each VM works alone on its own chips and takes parts of the
run; better where the model fits one VM, because no VM waits for another.'
rest_is='flags of jax-extract extract'
flags=(
  "${slice_flags[@]}"
  "${ssh_flags[@]}"
  'activations_dir where the run is written: gs://bucket/prefix'
  'mode spmd or workers'
  'mesh_shape DATA,MODEL; 8,8 in spmd mode, all chips of a VM on DATA in workers mode; auto leaves it to the program'
  'num_workers in workers mode: of how many; all VMs of the slice where it is left out'
  'worker_offset in workers mode: number of the first VM of this slice, where several slices share a run'
  'chip_bounds in workers mode: the chips of a VM as X,Y,Z, to which libtpu is confined; off sets nothing'
  'run_id name of this start; an earlier one finds its extraction again'
  'replace stop the extraction that runs on the VMs, then start'
  'stop stop the extraction that runs on the VMs; it commits what is complete'
)
read_flags "$@"
check_slice
worker=jax_extract/launch/tpu_pod/on_worker/extract.sh
if [[ $stop == True ]]; then
  on_workers all "exec $worker --stop True"
  exit
fi

check_extraction
check run_id '[A-Za-z0-9_-]{1,64}' 'a name of letters, digits, - and _'
if [[ -z $run_id ]]; then
  run_id=$(date +%Y%m%d-%H%M%S)-$RANDOM
fi
if [[ -z $mesh_shape && $mode == spmd ]]; then
  mesh_shape=8,8
fi

words=(--run_id "$run_id" --replace "$replace" --mode "$mode")
if [[ $mode == workers ]]; then
  words+=(--worker_offset "$worker_offset" --chip_bounds "$chip_bounds")
  [[ -z $num_workers ]] || words+=(--num_workers "$num_workers")
fi
words+=(-- --activations_dir "$activations_dir")
if [[ -n $mesh_shape && $mesh_shape != auto ]]; then
  words+=(--mesh_shape "$mesh_shape")
fi
say "run id $run_id: should the connection break, the same command with --run_id $run_id finds the extraction again"
on_workers all "exec $worker $(quoted "${words[@]}" "${rest[@]}")"
