#!/usr/bin/env bash
# Builds the container image of the project and pushes it.
#
# In: this checkout, and a name such as us-west4-docker.pkg.dev/PROJECT/REPOSITORY/jax-extract:1. Out: the image in
# its registry.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"

image='' push=True
about='Builds the container image of launch/gke/Dockerfile from this checkout and pushes it.'
flags=('image name of the image, with its registry and a tag' 'push push it to the registry')
read_flags "$@"
need image
check image '[A-Za-z0-9][A-Za-z0-9._:/@-]*' 'the name of a container image'
require_command docker 'install Docker (https://docs.docker.com/engine/install)'

run env DOCKER_BUILDKIT=1 docker build --platform=linux/amd64 "--file=$here/Dockerfile" "--tag=$image" "$root"
[[ $push == False ]] || run docker push "$image"
