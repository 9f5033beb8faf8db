#!/usr/bin/env bash
# All of stage 02: walks, training, representations.
#
# In: the variables of the three scripts. Out: what they write. Started again, it goes on where it was.
set -euo pipefail
# shellcheck source=launch/stage02/stage02.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage02.sh"
stage02_help "$@"

if [[ -z ${RUN_NAME:-}${OUTPUT_DIR:-} ]]; then # the same for training and extraction, whatever else was trained
  RUN_NAME=$(basename "${CONFIG:-config_400K_llama.json}" .json)
  export RUN_NAME=${RUN_NAME#config_}
fi
if [[ ! -e $DATASET_DIR ]]; then
  "$stage02/01_graph_walks.sh"
fi
"$stage02/02a_model_training.sh"
"$stage02/02b_representation_extraction.sh"
