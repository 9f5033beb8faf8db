#!/usr/bin/env bash
# Makes logit_lens.svg, the picture of the README.
#
#     docs/pictures/make.sh
#
# In: the demo's model, which is fetched where it is not there. Out: the file beside this one.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
model=$(python "$here/../../launch/demo_assets.py")/smollm2-135m-instruct.gguf
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT

echo '{"id": "capitals", "text": "The capital of France is Paris and the capital of Italy is the city of Rome"}' \
  >"$scratch/capitals.jsonl"
jax-extract extract --model_path "$model" --tasks_file "$scratch/capitals.jsonl" --positions all \
  --layers 2 5 8 11 14 17 20 23 26 29 --activations_dir "$scratch/run"
jax-extract plot "$scratch/run" --pictures lens
cp "$scratch/run/plots/lens.svg" "$here/logit_lens.svg"
