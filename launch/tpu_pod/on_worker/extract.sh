#!/usr/bin/env bash
# Runs on a VM: starts its share of an extraction, or finds the one that runs, and follows it to its end.
#
# In: the mode, a run id, flags of the extraction. Out: what the extraction says, line by line after this VM's number,
# and its exit code. The extraction itself is not a child of the connection. That matters: gcloud sends the same
# command again when a connection breaks, and a second program would find the chips taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
# shellcheck source=launch/common.sh
source launch/common.sh

mode=spmd run_id='' replace=False stop=False num_workers='' worker_offset=0 chip_bounds=2,2,1
stop_seconds=60
about='Runs on a VM of a slice; launch/tpu_pod/run_extraction.sh calls it on all of them.'
rest_is='flags of jax-extract extract'
flags=(
  'mode spmd or workers'
  'run_id name of this start; where it is known already, its extraction is followed, not started'
  'replace stop the extraction that runs, then start'
  'stop stop the extraction that runs'
  'num_workers of how many workers; all VMs of the slice where it is left out'
  'worker_offset number of the first VM of this slice'
  'chip_bounds the chips of this VM as X,Y,Z, or off'
  'stop_seconds how long an extraction may take to stop'
)
read_flags "$@"

state=$HOME/.jax_extract
mkdir -p "$state"
exec 9>>"$state/lock" # held by the supervisor and the extraction for as long as they live

attribute() { # NAME: what the slice's metadata says of this VM, as JAX itself asks for it
  curl --silent --fail --max-time 10 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

count_vms() {
  local endpoints
  endpoints=$(attribute worker-network-endpoints) || return
  awk -F, '{ print NF; exit }' <<<"$endpoints"
}

stop_running() { # SIGTERM: complete parts are committed within 25 s
  local pid
  pid=$(cat "$state/pid" 2>/dev/null || true)
  [[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true
  flock --wait "$stop_seconds" 9 || give_up 1 "the extraction on VM $number (process $pid) does not stop; kill it there"
}

confine() { # libtpu would look for all hosts of the slice: show it this VM's chips alone
  local axis chips=1 visible
  [[ $chip_bounds != off ]] || return 0
  for axis in ${chip_bounds//,/ }; do
    chips=$((chips * axis))
  done
  visible=$(seq --separator=, 0 $((chips - 1)))
  export TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=$chip_bounds TPU_VISIBLE_CHIPS=$visible
  export TPU_PROCESS_ADDRESSES=localhost:8476 TPU_PROCESS_PORT=8476 CLOUD_TPU_TASK_ID=0
}

start() {
  local words=(.venv/bin/jax-extract extract "${rest[@]}")
  if [[ $mode == workers ]]; then
    words+=(--distributed off --worker_id $((worker_offset + number)) --num_workers "$num_workers")
    confine
  else
    words+=(--distributed on)
  fi
  rm -f "$state/exit_code" "$state/pid"
  : >"$state/log"
  export TQDM_MININTERVAL=30 # seconds between two lines of progress
  setsid launch/tpu_pod/on_worker/supervise.sh "$state" "${words[@]}" </dev/null >/dev/null 2>&1 &
  printf '%s\n' $! >"$state/supervisor"
  printf '%s\n' "$run_id" >"$state/run_id"
}

follow() { # until the supervisor ends, and with the exit code that it leaves
  exec 9>&- # else this connection would hold the lock
  tail --lines=+1 --follow --sleep-interval=0.2 --pid="$(<"$state/supervisor")" "$state/log" \
    | stdbuf --output=0 tr '\r' '\n' | sed --unbuffered --quiet "/./s/^/[$number] /p" # progress bars end in \r
  [[ -s $state/exit_code ]] || give_up 1 "the extraction on VM $number ended without a word; the VM may be going down"
  exit "$(<"$state/exit_code")"
}

number=$(attribute agent-worker-number) || number=0
[[ $number =~ ^[0-9]+$ ]] || number=0
if [[ $stop == True ]]; then
  flock --nonblock 9 || stop_running
  say "no extraction runs on VM $number"
  exit
fi
need run_id
known=$(cat "$state/run_id" 2>/dev/null || true)
if [[ $known == "$run_id" ]]; then
  follow
fi
if [[ $mode == workers && -z $num_workers ]]; then
  num_workers=$(count_vms) || refuse 'the metadata do not say how many VMs the slice has; give --num_workers'
fi
[[ -x .venv/bin/jax-extract ]] || refuse "VM $number is not set up; run launch/tpu_pod/setup_workers.sh first"
if ! flock --nonblock 9; then
  if [[ $replace == False ]]; then
    refuse "VM $number runs an extraction already ($known); give --replace True, or --run_id $known to follow it"
  fi
  stop_running
fi
start
follow
