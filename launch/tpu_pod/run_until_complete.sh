#!/usr/bin/env bash
# Runs an extraction to its end through preemptions, unattended.
#
# In: what slice, how to set it up, flags of the extraction. Out: a complete run in the bucket, as `jax-extract status`
# says; exit code 1 when the tries are used up, 2 when the extraction is refused. Every try goes on where the last one
# was stopped: what is committed is not computed again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"
# shellcheck source=launch/tpu_pod/slice.sh
source "$here/slice.sh"

accelerator_type=v5litepod-64 runtime_version=v2-alpha-tpuv5-lite capacity=spot service_account=''
repository='' revision=HEAD data=()
activations_dir='' mode=spmd mesh_shape='' num_workers='' worker_offset=0 chip_bounds=2,2,1
max_tries=20 retry_seconds=30 max_retry_seconds=600 wait_seconds=86400 poll_seconds=30 grace_seconds=45
delete_when_done=False
about='Creates a slice, sets it up and runs an extraction; again after every preemption, until jax-extract status says
that the run is complete. Give the same words again after any interruption of this script itself.
Exit codes: 0 complete, 1 not complete after --max_tries, 2 a mistake, 5 no slice within --wait_seconds.'
rest_is='flags of jax-extract extract'
flags=(
  "${slice_flags[@]}"
  "${ssh_flags[@]}"
  'activations_dir where the run is written: gs://bucket/prefix'
  'accelerator_type kind and size of the slice'
  'runtime_version software of its VMs'
  'capacity spot, on_demand or reserved'
  'service_account that the VMs act as'
  'repository clone this URL on the VMs instead of copying this checkout'
  'revision branch, tag or commit of the project'
  'data file, folder or gs:// place to put into jax_extract/data/ on every VM; may be given again'
  'mode spmd or workers'
  'mesh_shape DATA,MODEL; as run_extraction.sh'
  'num_workers in workers mode: of how many; all VMs of the slice where it is left out'
  'worker_offset in workers mode: number of the first VM of this slice, where several slices share a run'
  'chip_bounds in workers mode: the chips of a VM as X,Y,Z; off sets nothing'
  'max_tries how often to start the extraction at most'
  'retry_seconds how long to wait after a failure; twice as long after each further one'
  'max_retry_seconds but never longer than this'
  'wait_seconds how long to wait for a slice'
  'poll_seconds how often to look at the slice'
  'grace_seconds how long the VMs of a lost slice are listened to'
  'delete_when_done delete the slice when the run is complete or the tries are used up'
)
read_flags "$@"
check_slice
check_request
check_setup
check_extraction
check_counts max_tries
check_seconds retry_seconds max_retry_seconds wait_seconds poll_seconds grace_seconds
find_jax_extract

slice=(--project "$project" --zone "$zone" --name "$name" --dry_run "$dry_run")
create=(
  "$here/create_slice.sh" "${slice[@]}" --accelerator_type "$accelerator_type" --runtime_version "$runtime_version"
  --capacity "$capacity" --wait_seconds "$wait_seconds" --poll_seconds "$poll_seconds"
)
[[ -z $service_account ]] || create+=(--service_account "$service_account")
setup=("$here/setup_workers.sh" "${slice[@]}" --internal_ip "$internal_ip" --revision "$revision")
[[ -z $repository ]] || setup+=(--repository "$repository")
for place in "${data[@]}"; do
  setup+=(--data "$place")
done
extract=(
  "$here/run_extraction.sh" "${slice[@]}" --internal_ip "$internal_ip" --replace True --mode "$mode"
  --activations_dir "$activations_dir" --worker_offset "$worker_offset" --chip_bounds "$chip_bounds"
)
[[ -z $mesh_shape ]] || extract+=(--mesh_shape "$mesh_shape")
[[ -z $num_workers ]] || extract+=(--num_workers "$num_workers")
extract+=(-- "${rest[@]}")
delete=("$here/delete_slice.sh" "${slice[@]}" --force True)
status=("$jax_extract" status "$activations_dir")

is_complete() { # keeps the exit code of status: 1 is incomplete, 2 that it could not look
  seen=0
  "${status[@]}" || seen=$?
  ((seen == 0))
}

slice_is_whole() { # sets state; a queued resource can be ACTIVE for a while after its VMs are gone
  slice_state
  [[ $state == ACTIVE ]] || return 1
  case $(gcloud compute tpus tpu-vm describe "$name" "--project=$project" "--zone=$zone" '--format=value(state)') in
    PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) state=PREEMPTED ;;
  esac
  [[ $state == ACTIVE ]]
}

make_slice() { # an ACTIVE slice, set up; returns what went wrong
  local deadline=$((SECONDS + ${wait_seconds%.*}))
  slice_is_whole || is_set_up=False
  while [[ $state == SUSPENDING || $state == DELETING ]]; do
    ((SECONDS < deadline)) || return 5
    sleep "$poll_seconds"
    slice_state
  done
  case $state in
    SUSPENDED | FAILED | PREEMPTED)
      say "$name is $state; deleting it and asking for another"
      "${delete[@]}" || return
      ;;
  esac
  "${create[@]}" || return
  if [[ $is_set_up == False ]]; then
    "${setup[@]}" || return
    is_set_up=True
  fi
}

run_watched() { # the extraction, ended when its slice is lost: a connection to a VM that is gone can hang for long
  local child code=0
  set -m # a process group of its own, so that gcloud's connections end with it
  "${extract[@]}" </dev/null &
  child=$!
  set +m
  trap 'stop_watching 130' INT
  trap 'stop_watching 143' TERM
  while is_set_up_still && kill -0 "$child" 2>/dev/null; do
    sleep "$poll_seconds" &
    wait $! || true # unlike a sleep in the foreground, a signal interrupts it
  done
  if [[ $is_set_up == False ]]; then
    say "$name is $state"
    sleep "$grace_seconds"
    kill -TERM -- "-$child" 2>/dev/null || true
  fi
  wait "$child" 2>/dev/null || code=$?
  trap - INT TERM
  ((code == 0)) || is_set_up_still || true
  return "$code"
}

is_set_up_still() { # the slice that was set up is there; an answer that does not come changes nothing
  slice_is_whole || [[ $state == UNKNOWN ]] || is_set_up=False
  [[ $is_set_up == True ]]
}

# shellcheck disable=SC2329  # the traps of run_watched call it
stop_watching() { # CODE; uses child of run_watched
  kill -TERM -- "-$child" 2>/dev/null || true
  say "stopped watching $name; its VMs go on and are billed; the same command goes on, delete_slice.sh ends it"
  exit "$1"
}

finish() { # CODE
  if [[ $delete_when_done == True ]]; then
    "${delete[@]}" || say "$name could not be deleted and is billed; delete it with launch/tpu_pod/delete_slice.sh"
  else
    say "$name may still be there, and is billed until launch/tpu_pod/delete_slice.sh deletes it"
  fi
  exit "$1"
}

if [[ $dry_run == True ]]; then
  say 'nothing of the following where the run is complete already:'
  run "${status[@]}"
  "${create[@]}"
  "${setup[@]}"
  "${extract[@]}"
  say "again from the first command, at most $max_tries times, until this one exits 0:"
  run "${status[@]}"
  [[ $delete_when_done == False ]] || "${delete[@]}"
  exit
fi

say "what is in $activations_dir so far:"
if is_complete; then
  say "$activations_dir is complete already"
  exit
fi
is_set_up=False refused=0 pause=$retry_seconds
for ((try = 1; try <= max_tries; try++)); do
  say "try $try of $max_tries"
  code=0
  make_slice || code=$?
  if ((code == 5)); then
    finish 5
  elif ((code == 0)); then
    run_watched || code=$?
    if is_complete; then
      say "$activations_dir is complete"
      finish 0
    elif ((code == 0 && seen == 2)); then
      say "every VM ended well, but this machine cannot see whether $activations_dir is complete; the reason is above"
      finish 2
    fi
    if [[ $is_set_up == False ]]; then # a lost slice is no fault of the command, and the queue is wait enough
      refused=0 pause=$retry_seconds
      continue
    fi
  fi
  if refused_twice "$code"; then
    finish 2
  elif ((try < max_tries)); then
    say "not complete (exit code $code); again in $pause s"
    sleep "$pause"
    pause=$(longer "$pause" "$max_retry_seconds")
  fi
done
printf 'error: %s\n' "$activations_dir is not complete after $max_tries tries; the same command goes on from there" >&2
finish 1
