#!/usr/bin/env bash
# Trains a Llama on walks; started again, it goes on from the last whole checkpoint.
#
# In: variables of the environment. Out: OUTPUT_DIR with checkpoint-STEP/ and final_model/. Without RUN_NAME the run is
# called as its CONFIG is: configs/config_2M_llama.json gives results/DATASET_NAME/2M_llama.
set -euo pipefail
# shellcheck source=launch/stage02/stage02.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage02.sh"
stage02_help "$@"

run_name_of_config
CONFIG=${CONFIG:-configs/config_$RUN_NAME.json}
if [[ ! -e $CONFIG && -e $root/$CONFIG ]]; then
  CONFIG=$root/$CONFIG
fi
OUTPUT_DIR=${OUTPUT_DIR:-results/$DATASET_NAME/$RUN_NAME}
choose_device

find_jax_extract
command=("$jax_extract" train)
add model_config CONFIG
add dataset_dir DATASET_DIR
add output_dir OUTPUT_DIR
add epochs EPOCHS 1
add batch_size BATCH_SIZE 50
add grad_accum GRAD_ACCUM 1
add learning_rate LEARNING_RATE 5e-4
add max_length MAX_LENGTH 128
add save_steps SAVE_STEPS 200
add eval_steps EVAL_STEPS 200
add logging_steps LOGGING_STEPS 10
add device DEVICE
add seed SEED
add dtype DTYPE
add mesh_shape MESH_SHAPE
add text_column TEXT_COLUMN
add_switch overwrite OVERWRITE
add_switch allow_numeric_change ALLOW_NUMERIC_CHANGE
start
