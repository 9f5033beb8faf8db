#!/usr/bin/env bash
# The upload job: uploads a run directory to a bucket, again and again until all of it is there.
#
# In: a local run directory and a place in a bucket; on this machine, or on every VM of a slice. Out: the run in the
# bucket; exit code 1 when the tries are used up, 2 when the upload is refused. Parts that are there are not sent again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/tpu_pod/slice.sh
source "$here/tpu_pod/slice.sh"

directory='' bucket='' delete_local=False on_all_workers=False
max_tries=20 retry_seconds=10 max_retry_seconds=600
about='Uploads a run directory to a bucket and repeats that, with longer and longer pauses, until all is there.
With --on_all_workers True each VM of the slice --name uploads its own directory.'
flags=(
  'directory the run directory, such as activations'
  'bucket where it goes: gs://bucket/prefix'
  'delete_local delete shards here when the bucket has them'
  'max_tries how often to try at most'
  'retry_seconds how long to wait after a failure; twice as long after each further one'
  'max_retry_seconds but never longer than this'
  'on_all_workers upload from every VM of a slice'
  "${slice_flags[@]}"
  "${ssh_flags[@]}"
)
read_flags "$@"
need directory bucket
check_bucket_place bucket
check directory '[^-].*' 'a directory'
check_counts max_tries
check_seconds retry_seconds max_retry_seconds

if [[ $on_all_workers == True ]]; then
  check_slice
  words=(launch/upload.sh --directory "$directory" --bucket "$bucket" --delete_local "$delete_local")
  words+=(--max_tries "$max_tries" --retry_seconds "$retry_seconds" --max_retry_seconds "$max_retry_seconds")
  on_workers all "cd jax_extract && exec $(quoted "${words[@]}")"
  exit
fi

find_jax_extract
upload=("$jax_extract" upload "$directory" "$bucket")
[[ $delete_local == False ]] || upload+=(--delete_local True)
if [[ $dry_run == True ]]; then
  say "again, at most $max_tries times, until it exits 0:"
  run "${upload[@]}"
  exit
fi
refused=0 pause=$retry_seconds
for ((try = 1; try <= max_tries; try++)); do
  code=0
  "${upload[@]}" || code=$?
  ((code != 0)) || exit 0
  ((code != 130)) || exit 130 # interrupted at the keyboard
  if refused_twice "$code"; then
    exit 2
  elif ((try < max_tries)); then
    say "try $try of $max_tries ended with exit code $code; again in $pause s"
    sleep "$pause"
    pause=$(longer "$pause" "$max_retry_seconds")
  fi
done
give_up 1 "$(quoted "$directory") is not all in $bucket after $max_tries tries; the same command goes on"
