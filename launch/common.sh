# shellcheck shell=bash
# What the launch scripts share: flags, the dry run, checks, messages. To be sourced.
#
# In: a script's words. The script keeps each flag's default in a variable of the flag's name, lists the flags in
# `flags` ("name what it is"), says in `about` what it does and in `rest_is` what may follow `--`, and calls
# `read_flags "$@"`. A default of True or False makes a switch, an array a flag that may be given again.
# Out: the variables; the words after `--` in `rest`; one sentence and exit code 2 for a mistake.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION is too old for the launch scripts; put bash 4.4 or newer first on PATH" >&2
  exit 2
fi

program=${0##*/}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=False
about=''
rest_is=''
rest=()

refuse() { # SENTENCE: a mistake that the user can mend
  printf 'error: %s\n' "$1" >&2
  exit 2
}

give_up() { # CODE SENTENCE
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

say() { # SENTENCE, a comment among the commands of a dry run
  if [[ $dry_run == True ]]; then
    printf '# %s\n' "$1"
  else
    printf '%s\n' "$1"
  fi
}

quoted() { # WORDS, as one line that a shell reads back as these words
  local word line=''
  for word in "$@"; do
    matches "$word" '[A-Za-z0-9_./:,=@%+-]+' || word=${word@Q}
    line+=" $word"
  done
  printf '%s' "${line# }"
}

matches() { # WORD PATTERN, whole; the ranges of a pattern are those of ASCII everywhere
  local LC_ALL=C
  [[ $1 =~ ^($2)$ ]]
}

run() { # COMMAND: run, or in a dry run printed so that it can be pasted
  if [[ $dry_run == True ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

read_flags() {
  local _word _flag _value _given=' '
  flags+=('dry_run print every command, quoted for a shell, and run none')
  while (($#)); do
    _word=$1
    shift
    case $_word in
      -h | --help) show_help && exit 0 ;;
      --)
        [[ -n $rest_is ]] || refuse "$program takes nothing after --; $program --help lists its flags"
        rest=("$@")
        break
        ;;
      --?*) ;;
      *) refuse "$(quoted "$_word") is no flag; $program --help lists the flags" ;;
    esac
    _flag=${_word#--}
    _flag=${_flag%%=*}
    _flag=${_flag//-/_}
    is_flag "$_flag" || refuse "--$(quoted "$_flag") is no flag; $program --help lists the flags"
    if [[ $_word == *=* ]]; then
      _value=${_word#*=}
    elif is_switch "$_flag" && { (($# == 0)) || [[ $1 == -* ]]; }; then
      _value=True
    elif (($# == 0)) || [[ $1 == --* ]]; then
      refuse "--$_flag needs a value; $program --help says which"
    else
      _value=$1
      shift
    fi
    if is_switch "$_flag" && [[ $_value != True && $_value != False ]]; then
      refuse "--$_flag $(quoted "$_value") must be True or False"
    fi
    set_flag "$_flag" "$_value"
  done
}

is_flag() {
  local line
  for line in "${flags[@]}"; do
    [[ ${line%% *} != "$1" ]] || return 0
  done
  return 1
}

is_switch() { [[ ${!1-} == True || ${!1-} == False ]]; }

set_flag() { # FLAG VALUE; uses _given of read_flags
  if [[ $(declare -p "$1") == 'declare -a'* ]]; then
    local -n _list=$1
    _list+=("$2")
    return
  fi
  [[ $_given != *" $1 "* ]] || refuse "--$1 was given twice; give it once"
  _given+="$1 "
  printf -v "$1" '%s' "$2"
}

show_help() {
  local _line _flag _default
  printf 'usage: %s [flags]%s\n\n%s\n\nflags:\n' "$program" "${rest_is:+ -- $rest_is}" "$about"
  for _line in "${flags[@]}"; do
    _flag=${_line%% *}
    _default=${!_flag-}
    printf '  --%-19s %s%s\n' "$_flag" "${_line#* }" "${_default:+ (default: $_default)}"
  done
}

need() { # FLAGS that must be given
  local _flag
  for _flag in "$@"; do
    [[ -n ${!_flag-} ]] || refuse "--$_flag is needed; $program --help says what it is"
  done
}

check() { # FLAG PATTERN WHAT-IT-IS: the flag's value matches the pattern, or is empty
  [[ -z ${!1} ]] || matches "${!1}" "$2" || refuse "--$1 $(quoted "${!1}") is not $3"
}

check_names() { # FLAGS that name something in Google Cloud or Kubernetes
  local _flag
  for _flag in "$@"; do
    check "$_flag" '[a-z]([a-z0-9-]{0,61}[a-z0-9])?' 'a name of lower-case letters, digits and hyphens'
  done
}

check_counts() { # FLAGS that are whole numbers from 1
  local _flag
  for _flag in "$@"; do
    check "$_flag" '[1-9][0-9]{0,8}' 'a whole number from 1'
  done
}

check_seconds() {
  local _flag
  for _flag in "$@"; do
    check "$_flag" '[0-9]{1,9}(\.[0-9]{1,6})?' 'a number of seconds'
  done
}

check_bucket_place() { # FLAG that is gs://bucket/prefix
  check "$1" 'gs://[a-z0-9][a-z0-9._-]{1,220}(/[^[:cntrl:]]*)?' 'a place in a bucket; write gs://bucket/prefix'
}

require_command() { # COMMAND HOW-TO-GET-IT; a dry run needs none
  [[ $dry_run == True ]] || command -v "$1" >/dev/null || refuse "$1 is not on PATH; $2"
}

find_jax_extract() { # sets jax_extract: the command on PATH, or in the project's own environment
  jax_extract=jax-extract
  if ! command -v jax-extract >/dev/null && [[ -x $root/.venv/bin/jax-extract ]]; then
    jax_extract=$root/.venv/bin/jax-extract
  fi
  require_command "$jax_extract" 'activate the environment (source .venv/bin/activate) or pip install -e .'
}

longer() { # SECONDS MOST: twice as long, but at most MOST
  LC_ALL=C awk -v now="$1" -v most="$2" 'BEGIN { print (2 * now < most) ? 2 * now : most }'
}

refused_twice() { # CODE: whether the command was refused two times in a row; counts in `refused`
  # 2 is a mistake that no repetition mends, unless it was the network that made it look like one: hence twice.
  if (($1 == 2)); then
    refused=$((refused + 1))
  else
    refused=0
  fi
  ((refused >= 2))
}
