#!/usr/bin/env bash
# Makes the walks that stage 02 trains on.
#
# In: variables of the environment. Out: DATASET_DIR with train.jsonl, validation.jsonl, vocab.json and graph.json.
set -euo pipefail
# shellcheck source=launch/stage02/stage02.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage02.sh"
stage02_help "$@"

find_jax_extract
command=("$jax_extract" walks)
add dataset_dir DATASET_DIR
add graph GRAPH
add nodes NODES
add neighbours NEIGHBOURS
add graph_seed GRAPH_SEED
add train_walks TRAIN_WALKS
add validation_walks VALIDATION_WALKS
add walk_length WALK_LENGTH
add seed SEED
start
