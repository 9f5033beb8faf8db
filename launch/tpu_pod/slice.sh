# shellcheck shell=bash
# What the scripts of a TPU slice share: its flags, its state, commands on its VMs. To be sourced after common.sh.
#
# In: the flags below. Out: functions around `gcloud compute tpus`.

project='' zone='' name='' internal_ip=False
# shellcheck disable=SC2034  # used by the scripts that source this file
slice_flags=(
  'project the Google Cloud project'
  'zone the zone of the slice, such as us-west4-a'
  'name of the queued resource and of its slice'
)
# shellcheck disable=SC2034
ssh_flags=('internal_ip connect to the VMs by their internal addresses')

check_slice() { # the flags above, and that there is a gcloud
  need project zone name
  check project '[a-z][a-z0-9:.-]{4,61}[a-z0-9]' 'the id of a project'
  check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone, such as us-west4-a'
  check_names name
  require_command gcloud 'install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)'
}

queued_resource() { # VERB FLAGS…: the words of a command about the queued resource, in `words`
  words=(gcloud compute tpus queued-resources "$1" "$name" "--project=$project" "--zone=$zone" "${@:2}")
}

show_state() { # the command that asks for the state, in `words`
  queued_resource describe '--format=value(state.state)'
}

slice_state() { # sets state: what the service says, or NONE where there is no such queued resource
  local errors words
  show_state
  errors=$(mktemp)
  if state=$("${words[@]}" 2>"$errors"); then
    [[ -n $state ]] || state=UNKNOWN
  elif grep --quiet --ignore-case --extended-regexp 'NOT_FOUND|not found' "$errors"; then
    state=NONE
  else
    cat "$errors" >&2
    state=UNKNOWN
  fi
  rm -f "$errors"
}

on_workers() { # WORKERS COMMAND-LINE: runs a command line on VMs of the slice, all at once
  local words=(gcloud compute tpus tpu-vm ssh "$name" "--project=$project" "--zone=$zone" "--worker=$1" --quiet)
  # A preempted VM may vanish without a word: ssh must notice.
  words+=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=6)
  [[ $internal_ip == False ]] || words+=(--internal-ip)
  run "${words[@]}" "--command=$2"
}

to_workers() { # LOCAL REMOTE: copies a file or a folder to all VMs
  local words=(gcloud compute tpus tpu-vm scp --recurse "$1" "$name:$2" "--project=$project" "--zone=$zone")
  words+=(--worker=all --quiet)
  [[ $internal_ip == False ]] || words+=(--internal-ip)
  run "${words[@]}"
}
