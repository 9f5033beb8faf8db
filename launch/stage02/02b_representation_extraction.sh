#!/usr/bin/env bash
# Extracts a representation of every token from a trained model.
#
# In: variables of the environment. Out: token_representations.npz and representation_info.json. Without MODEL_DIR,
# RUN_NAME and CONFIG it is the model of DATASET_NAME that was trained last.
set -euo pipefail
# shellcheck source=launch/stage02/stage02.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage02.sh"
stage02_help "$@"

[[ -z $dataset_given || -d $dataset_given ]] || is_true CHECK_ONLY ||
  refuse "there is no dataset folder DATASET_DIR $(quoted "$dataset_given"); name the one with the walks, or leave it out"
if [[ -n ${MODEL_DIR:-} && -z $dataset_given ]]; then
  DATASET_DIR='' # whatever the model was trained on, it need not be the default
fi
if [[ -z ${MODEL_DIR:-} && -n ${OUTPUT_DIR:-} ]]; then
  MODEL_DIR=$OUTPUT_DIR/final_model
fi
if [[ -n ${CONFIG:-} ]]; then
  run_name_of_config
fi
if is_true CHECK_ONLY; then # the model may still have to be trained
  to_be_trained=${OUTPUT_DIR:-results/$DATASET_NAME/${RUN_NAME:-400K_llama}}/final_model
  MODEL_DIR=${MODEL_DIR:-$to_be_trained}
fi
if [[ -z ${RUN_NAME:-} && -z ${MODEL_DIR:-} ]]; then
  for model in "results/$DATASET_NAME"/*/final_model; do
    if [[ -d $model && (-z ${MODEL_DIR:-} || $model -nt $MODEL_DIR) ]]; then
      MODEL_DIR=$model
    fi
  done
fi
MODEL_DIR=${MODEL_DIR:-results/$DATASET_NAME/${RUN_NAME:-400K_llama}/final_model}
[[ -d $MODEL_DIR || $MODEL_DIR == "${to_be_trained-}" ]] ||
  refuse "there is no trained model $(quoted "$MODEL_DIR"); train one with 02a_model_training.sh, or name it in MODEL_DIR"
if [[ -n ${RUN_NAME:-} && -z ${OUTPUT_DIR:-} ]]; then
  REPRESENTATION_DIR=${REPRESENTATION_DIR:-results/$DATASET_NAME/$RUN_NAME/token_representations}
fi
REPRESENTATION_DIR=${REPRESENTATION_DIR:-$(dirname "$MODEL_DIR")/token_representations}
read -r -d '' -a types <<<"${REPRESENTATIONS:-after_block}" || true # over lines too: no NUL ends it
((${#types[@]})) || refuse "REPRESENTATIONS $(quoted "$REPRESENTATIONS") names no hook point; name some, such as after_block"
choose_device

find_jax_extract
command=("$jax_extract" token-representations)
add model_path MODEL_DIR
add representation_dir REPRESENTATION_DIR
names+=(representations=REPRESENTATIONS)
command+=(--representations "${types[@]}")
add device DEVICE
if [[ -d $DATASET_DIR ]] || is_true CHECK_ONLY; then
  add dataset_dir DATASET_DIR
fi
add source SOURCE
add walks WALKS
add text_column TEXT_COLUMN
add dtype DTYPE
add mesh_shape MESH_SHAPE
start
