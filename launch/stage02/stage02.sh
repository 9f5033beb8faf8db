# shellcheck shell=bash
# What the scripts of stage 02 share: variables of the environment, and where their values lead. To be sourced.
#
# In: DATASET_NAME, RUN_NAME, CONFIG and the rest, as docs/stage02.md lists them. Out: the same with their defaults;
# one sentence and exit code 2 for a value that is none. Relative paths start where the script is called; a CONFIG that
# is not there is looked for in the project.
stage02=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$stage02/../common.sh"

DATASET_NAME=${DATASET_NAME:-king_torus_10x10}
matches "$DATASET_NAME" '[A-Za-z0-9_][A-Za-z0-9._-]*' ||
  refuse "DATASET_NAME $(quoted "$DATASET_NAME") is no name of a folder; write letters, digits, _, . and -"
[[ -z ${RUN_NAME:-} ]] || matches "$RUN_NAME" '[A-Za-z0-9_][A-Za-z0-9._-]*' ||
  refuse "RUN_NAME $(quoted "$RUN_NAME") is no name of a folder; write letters, digits, _, . and -"
# shellcheck disable=SC2034 # of the script that extracts
dataset_given=${DATASET_DIR:-}
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

add() { # FLAG VARIABLE: the flag with the variable's value, where it has one; adds to `command`
  [[ -z ${!2:-} ]] || command+=("--$1" "${!2}")
}
