#!/usr/bin/env bash
# Requests a TPU slice as a queued resource and waits until it is there.
#
# In: what slice, where, and as which kind of capacity. Out: an ACTIVE slice; exit codes 3 (the request failed),
# 4 (suspended: preempted or deleted), 5 (not there in time). A request that already waits is waited for.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"
# shellcheck source=launch/tpu_pod/slice.sh
source "$here/slice.sh"

accelerator_type=v5litepod-64 runtime_version=v2-alpha-tpuv5-lite
capacity=spot service_account=''
wait_seconds=86400 poll_seconds=30
about='Requests a TPU slice as a queued resource and waits until it is ACTIVE.
Exit codes: 0 active, 2 a mistake, 3 the request failed, 4 suspended, 5 not active within --wait_seconds.'
rest_is='further flags of gcloud compute tpus queued-resources create'
flags=(
  "${slice_flags[@]}"
  'accelerator_type kind and size of the slice'
  'runtime_version software of its VMs'
  'capacity spot, on_demand or reserved'
  'service_account that the VMs act as; the default service account of the project where it is left out'
  'wait_seconds how long to wait for the slice'
  'poll_seconds how often to ask'
)
read_flags "$@"
check_slice
check_request
check_seconds wait_seconds poll_seconds

request() {
  local words
  queued_resource create "--node-id=$name" "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version"
  case $capacity in
    spot) words+=(--spot) ;;
    reserved) words+=(--reserved) ;;
  esac
  [[ -z $service_account ]] || words+=("--service-account=$service_account")
  run "${words[@]}" --quiet --async "${rest[@]}"
}

await_active() {
  local last='' unknown=0 deadline=$((SECONDS + ${wait_seconds%.*}))
  while :; do
    slice_state
    [[ $state == "$last" ]] || say "$(date +%H:%M:%S) $name: $state"
    last=$state
    case $state in
      ACTIVE) return ;;
      FAILED)
        show_reason
        give_up 3 "the request for $name failed; mend the reason above, then launch/tpu_pod/delete_slice.sh and again"
        ;;
      SUSPENDING | SUSPENDED | DELETING)
        give_up 4 "$name is $state: preempted or deleted; launch/tpu_pod/delete_slice.sh, then again"
        ;;
      UNKNOWN) ((++unknown < 5)) || give_up 1 "gcloud did not say the state of $name; its own message is above" ;;
      *) unknown=0 ;;
    esac
    ((SECONDS < deadline)) || give_up 5 "$name is $state after $wait_seconds s; run the same command to wait on"
    sleep "$poll_seconds"
  done
}

show_reason() {
  local words
  queued_resource describe '--format=yaml(state)'
  "${words[@]}" >&2 || true
}

if [[ $dry_run == True ]]; then
  request
  show_state
  say "and then, every $poll_seconds s, until it says ACTIVE:"
  run "${words[@]}"
  exit
fi
slice_state
[[ $state != NONE ]] || request
await_active
