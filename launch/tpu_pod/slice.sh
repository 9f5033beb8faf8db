# shellcheck shell=bash
# What the scripts of a TPU slice share: its flags, its state, commands on its VMs. To be sourced after common.sh.
#
# In: the flags below. Out: functions around `gcloud compute tpus`.

project='' zone='' name='' internal_ip=False said_last=''
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

# The checks are here so that run_until_complete.sh, which calls the other scripts, can refuse their flags before
# anything is done.

check_request() { # the flags of create_slice.sh
  check accelerator_type '[a-z0-9]+-[0-9]+' 'an accelerator type, such as v5litepod-64'
  check runtime_version '[a-z0-9][a-z0-9.-]*' 'a runtime version, such as v2-alpha-tpuv5-lite'
  check capacity 'spot|on_demand|reserved' 'a kind of capacity; choose spot, on_demand or reserved'
  check service_account '[a-z0-9][a-z0-9-]*@[a-z0-9.-]+' 'the e-mail address of a service account'
}

# shellcheck disable=SC2154  # the scripts that source this file set these
check_setup() { # the flags of setup_workers.sh
  local place
  check repository '((https|ssh)://|[A-Za-z0-9][A-Za-z0-9._-]*@[A-Za-z0-9.-]+:)[^[:space:][:cntrl:]]+' \
    'the URL of a repository'
  check revision '[A-Za-z0-9_][A-Za-z0-9_./~^-]*' 'a branch, tag or commit'
  if [[ -z $repository && $revision != HEAD ]]; then
    git -C "$root" rev-parse --quiet --verify "$revision^{commit}" >/dev/null ||
      refuse "--revision $revision is not in this checkout; fetch it, or give the --repository that has it"
  fi
  for place in "${data[@]}"; do
    [[ $place == gs://* || -e $place ]] || refuse "--data $(quoted "$place") is neither here nor a gs:// place"
  done
}

# shellcheck disable=SC2154
check_extraction() { # the flags of run_extraction.sh, and those of the extraction
  local word
  need activations_dir
  check_bucket_place activations_dir
  check mode 'spmd|workers' 'a mode; choose spmd or workers'
  check mesh_shape 'auto|[1-9][0-9]*,[1-9][0-9]*' 'DATA,MODEL, such as 8,8'
  check_counts num_workers
  check worker_offset '[0-9]{1,6}' 'a whole number from 0'
  check chip_bounds 'off|[1-9],[1-9],[1-9]' 'X,Y,Z, such as 2,2,1'
  for word in "${rest[@]}"; do
    case ${word%%=*} in
      --activations[_-]dir | --mesh[_-]shape | --num[_-]workers)
        refuse "${word%%=*} is a flag of $program; give it before --"
        ;;
      --worker[_-]id | --distributed | --coordinator[_-]address | --num[_-]processes | --process[_-]id)
        refuse "${word%%=*} is decided by --mode $mode; leave it out"
        ;;
    esac
  done
}

queued_resource() { # VERB FLAGS…: the words of a command about the queued resource, in `words`
  words=(gcloud compute tpus queued-resources "$1" "$name" "--project=$project" "--zone=$zone" "${@:2}")
}

show_state() { # the command that asks for the state, in `words`
  queued_resource describe '--format=value(state.state)'
}

slice_state() { # sets state: what the service says, or NONE where there is no such queued resource
  local errors words said
  show_state
  errors=$(mktemp)
  if state=$("${words[@]}" 2>"$errors"); then
    said=''
    [[ -n $state ]] || state=UNKNOWN
  elif grep --quiet --ignore-case --extended-regexp 'NOT_FOUND|not found' "$errors"; then
    said=''
    state=NONE
  else
    said=$(<"$errors")
    [[ $said == "$said_last" ]] || printf '%s\n' "$said" >&2 # who asks again and again reads it once
    state=UNKNOWN
  fi
  said_last=$said
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
