# shellcheck shell=bash
# What the scripts of stage 02 share: variables of the environment, and where their values lead. To be sourced.
#
# In: DATASET_NAME, RUN_NAME, CONFIG and the rest, as docs/stage02.md lists them. Out: the same with their defaults;
# one sentence and exit code 2 for a value that is none. Relative paths start where the script is called; a CONFIG that
# is not there is looked for in the project.
stage02=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$stage02/../common.sh"

require_folder_name() { # VARIABLE VALUE
  matches "$2" '[A-Za-z0-9_][A-Za-z0-9._-]*' ||
    refuse "$1 $(quoted "$2") is no name of a folder; write letters, digits, _, . and -"
}

run_name_of_config() { # sets RUN_NAME, where it is not given: 2M_llama of configs/config_2M_llama.json
  [[ -z ${RUN_NAME:-} ]] || return 0
  RUN_NAME=$(basename -- "${CONFIG:-config_400K_llama.json}" .json)
  RUN_NAME=${RUN_NAME#config_}
  [[ -n ${OUTPUT_DIR:-} ]] || require_folder_name 'RUN_NAME, as CONFIG gives it,' "$RUN_NAME"
}

DATASET_NAME=${DATASET_NAME:-king_torus_10x10}
require_folder_name DATASET_NAME "$DATASET_NAME"
[[ -z ${RUN_NAME:-} ]] || require_folder_name RUN_NAME "$RUN_NAME"
# shellcheck disable=SC2034 # of the script that extracts
dataset_given=${DATASET_DIR:-}
names=() # flag=VARIABLE of every flag that a variable sets
DATASET_DIR=${DATASET_DIR:-results/$DATASET_NAME/dataset}

stage02_help() { # WORDS of the command line, then what it is
  case ${1-} in
    '') ;;
    -h | --help)
      printf 'usage: [VARIABLE=value …] %s\n\nThe variables and their defaults are in docs/stage02.md.\n' "$program"
      exit 0
      ;;
    *) refuse "$(quoted "$1") is not expected; $program takes variables of the environment, as docs/stage02.md lists them" ;;
  esac
}

add_switch() { # FLAG VARIABLE: the flag, where the variable says true; adds to `command`
  names+=("$1=$2")
  if is_true "$2"; then
    command+=("--$1" True)
  fi
}

is_true() { # VARIABLE: whether it says true
  case ${!1:-false} in
    true | True | TRUE | 1 | yes) return 0 ;;
    false | False | FALSE | 0 | no) return 1 ;;
    *) refuse "$1 $(quoted "${!1}") must be true or false" ;;
  esac
}

choose_device() { # sets DEVICE from USE_CPU
  if is_true USE_CPU; then
    [[ ${DEVICE:-cpu} == cpu ]] || refuse "USE_CPU=true and DEVICE=$(quoted "$DEVICE") contradict each other; give one"
    DEVICE=cpu
  fi
  DEVICE=${DEVICE:-auto}
}

add() { # FLAG VARIABLE [DEFAULT]: the flag with the variable's value, or the default; adds to `command`
  local value=${!2:-${3-}}
  names+=("$1=$2")
  [[ -z $value ]] || command+=("--$1" "$value")
}

start() { # runs `command`, which tells mistakes by the names of variables; with CHECK_ONLY it finds those alone
  add_switch check_only CHECK_ONLY
  export JAX_EXTRACT_VARIABLES="${names[*]}"
  exec "${command[@]}"
}
