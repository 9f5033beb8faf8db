# shellcheck shell=bash
# What the scripts of phase 3 share: their flags, and the one command that both run. To be sourced.
#
# In: `about`, and the default of `task`. Out: representations of the base model and of every trained model of these
# tasks, by `jax-extract representations`.
phase3=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$phase3/../common.sh"

results_dir='' output_dir='' base_dir='' data_dir='' device='' method=() seed=()
checkpoints=False skip_half_saved=False overwrite=False
# shellcheck disable=SC2034 # of common.sh
rest_is='flags of jax-extract representations'
# shellcheck disable=SC2034
flags=(
  'results_dir folder of the trained models; by default results, here or in the project'
  'task only models of this task: mrpc, sst2, rte or squad_v2; may be given again'
  'method only models of this method: full_finetune or lora; may be given again'
  'seed only models with this seed; may be given again'
  'output_dir by default RESULTS_DIR/phase3_representations/representations'
  'base_dir for the base model; by default base_representations, beside RESULTS_DIR'
  'data_dir local validation data: TASK/validation.jsonl or .csv in it; by default what the models were trained with'
  'device cpu, cuda or cuda:N'
  'checkpoints also the checkpoints that were kept'
  'skip_half_saved pass over trainings that are not done'
  'overwrite compute anew what is there already'
)

extract_all() { # TASKS by default: runs the command
  ((${#task[@]})) || task=("$@")
  if [[ -z $results_dir ]]; then # documented as `cd launch/phase3; bash vm1.sh`, and from the project's root
    results_dir=results
    [[ -d $results_dir || ! -d $root/results ]] || results_dir=$root/results
  fi
  find_jax_extract
  local command=("$jax_extract" representations --results_dir "$results_dir")
  ((${#task[@]} == 0)) || command+=(--tasks "${task[@]}")
  ((${#method[@]} == 0)) || command+=(--methods "${method[@]}")
  ((${#seed[@]} == 0)) || command+=(--seeds "${seed[@]}")
  [[ -z $output_dir ]] || command+=(--output_dir "$output_dir")
  [[ -z $base_dir ]] || command+=(--base_dir "$base_dir")
  [[ -z $data_dir ]] || command+=(--data_dir "$data_dir")
  [[ -z $device ]] || command+=(--device "$device")
  [[ $checkpoints == False ]] || command+=(--checkpoints True)
  [[ $skip_half_saved == False ]] || command+=(--skip_half_saved True)
  [[ $overwrite == False ]] || command+=(--overwrite True)
  run "${command[@]}" "${rest[@]}"
}
