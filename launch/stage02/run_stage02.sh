#!/usr/bin/env bash
# All of stage 02: walks, training, representations.
#
# In: the variables of the three scripts. Out: what they write. Started again, it goes on where it was.
set -euo pipefail
# shellcheck source=launch/stage02/stage02.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage02.sh"
stage02_help "$@"

if [[ -z ${OUTPUT_DIR:-} ]]; then # the same for training and extraction, whatever else was trained
  run_name_of_config
  export RUN_NAME
fi
# A mistake in any variable is told before the first of the three begins.
for script in 01_graph_walks.sh 02a_model_training.sh 02b_representation_extraction.sh; do
  CHECK_ONLY=true "$stage02/$script"
done
if is_true CHECK_ONLY; then
  exit 0
fi
# Walks that are there are made again where it is said how they were made: 01 refuses to mix them with others. SEED is
# the training's too and says nothing of them. Walks without a graph.json are the user's own.
of_walks=${GRAPH:-}${NODES:-}${NEIGHBOURS:-}${GRAPH_SEED:-}${TRAIN_WALKS:-}${VALIDATION_WALKS:-}${WALK_LENGTH:-}
if [[ ! -e $DATASET_DIR || (-n $of_walks && -e $DATASET_DIR/graph.json) ]]; then
  "$stage02/01_graph_walks.sh"
fi
"$stage02/02a_model_training.sh"
"$stage02/02b_representation_extraction.sh"
