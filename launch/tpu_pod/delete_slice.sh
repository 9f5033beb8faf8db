#!/usr/bin/env bash
# Deletes a slice: the queued resource and its VMs, and with them the bill.
#
# In: its name, and a yes. Out: nothing left of it; what is in buckets stays.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"
# shellcheck source=launch/tpu_pod/slice.sh
source "$here/slice.sh"

force=False
about='Deletes a queued resource and the VMs of its slice, after asking for its name.'
flags=("${slice_flags[@]}" 'force do not ask')
read_flags "$@"
check_slice

if [[ $force == False && $dry_run == False ]]; then
  [[ -t 0 ]] || refuse "nobody is here to be asked whether to delete $name; give --force True"
  read -r -p "Delete $name, with everything on the disks of its VMs? Type its name: " answer
  [[ $answer == "$name" ]] || refuse "$(quoted "$answer") is not $name; nothing is deleted"
fi
queued_resource delete --force --quiet
run "${words[@]}"
