#!/usr/bin/env bash
# Fine-tunes a base model on every task, by every method, with every seed: 18 models by default.
#
# In: the base model, tasks, methods, seeds, and flags of the fine-tuning. Out: a folder for each in --output_dir; exit
# code 1 when some are not whole, 2 when one is refused. The same words again go on: whole ones are not trained again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"

model_path='' output_dir=results data_dir='' num_processes=1
task=() method=() seed=()
about='Fine-tunes a base model on MRPC, SST-2 and RTE, whole and by LoRA, with the seeds 42, 43 and 44: 18 models, one
after the other. Give the same words again after any interruption.'
rest_is='flags of jax-extract finetune'
flags=(
  'model_path Hugging Face folder or hub id of the base model'
  'output_dir where the folders are made'
  'data_dir local data instead of the hub: TASK/train.jsonl and TASK/validation.jsonl (or .csv) in it'
  'task mrpc, sst2, rte or squad_v2; may be given again'
  'method full_finetune or lora; may be given again'
  'seed may be given again'
  'num_processes GPUs that train one model together, by accelerate'
)
read_flags "$@"
need model_path output_dir
((${#task[@]})) || task=(mrpc sst2 rte)
((${#method[@]})) || method=(full_finetune lora)
((${#seed[@]})) || seed=(42 43 44)
check_counts num_processes
for one in "${seed[@]}"; do
  matches "$one" '[0-9]{1,10}' || refuse "--seed $(quoted "$one") is not a whole number"
done

if ((num_processes > 1)); then
  require_command accelerate 'pip install -e ".[torch]"'
  finetune=(accelerate launch --num_processes "$num_processes" -m jax_extract.cli finetune)
else
  find_jax_extract
  finetune=("$jax_extract" finetune)
fi

local_file() { # TASK SPLIT: sets file
  for file in "$data_dir/$1/$2.jsonl" "$data_dir/$1/$2.csv"; do
    [[ ! -f $file ]] || return 0
  done
  refuse "$(quoted "$data_dir/$1") has neither $2.jsonl nor $2.csv; --data_dir holds both splits of every task"
}

files=()
data_of() { # TASK: sets files
  files=()
  [[ -n $data_dir ]] || return 0
  local_file "$1" train
  files+=(--train_file "$file")
  local_file "$1" validation
  files+=(--validation_file "$file")
}

for one in "${task[@]}"; do # before the first hour of training
  data_of "$one"
done

failed=0 number=0 all=$((${#task[@]} * ${#method[@]} * ${#seed[@]}))
for one in "${task[@]}"; do
  data_of "$one"
  for how in "${method[@]}"; do
    for start in "${seed[@]}"; do
      number=$((number + 1))
      say "model $number of $all: $how, $one, seed $start"
      words=(--model_path "$model_path" --task "$one" --method "$how" --seed "$start" --output_dir "$output_dir")
      code=0
      run "${finetune[@]}" "${words[@]}" "${files[@]}" "${rest[@]}" || code=$?
      case $code in
        0) ;;
        2) exit 2 ;; # what one command is refused for, the next would be too
        130 | 143) exit "$code" ;;
        *)
          say "it ended with exit code $code"
          failed=$((failed + 1))
          ;;
      esac
    done
  done
done
((failed == 0)) || give_up 1 "$failed of $all models are not whole; the same command goes on with them"
