#!/usr/bin/env bash
# Extracts the representations of the trained models of the classification tasks.
#
# In: a results folder. Out: a folder for each model, and base_representations. Give the same words again after any
# interruption.
set -euo pipefail
# shellcheck source=launch/phase3/phase3.sh
source "$(dirname "${BASH_SOURCE[0]}")/phase3.sh"

task=()
about='Extracts the representations of the trained models of MRPC, SST-2 and RTE, and of their base model. What is there
already is not computed again.'
read_flags "$@"
extract_all mrpc sst2 rte
