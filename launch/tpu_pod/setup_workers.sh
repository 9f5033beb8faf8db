#!/usr/bin/env bash
# Makes every VM of a slice ready: the project, its environment, models and inputs.
#
# In: an ACTIVE slice; this checkout, or a repository to clone. Out: on every VM `jax_extract/` with `.venv`, and the
# models and inputs in `jax_extract/data/`. Doing it again renews what changed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/../common.sh"
# shellcheck source=launch/tpu_pod/slice.sh
source "$here/slice.sh"

repository='' revision=HEAD data=()
about='Puts the project, its environment and data on every VM of a slice.
The project is this checkout at --revision, or --repository at --revision, which the VMs clone themselves.'
flags=(
  "${slice_flags[@]}"
  "${ssh_flags[@]}"
  'repository clone this URL on the VMs instead of copying this checkout'
  'revision branch, tag or commit; what is not committed is not copied'
  'data file, folder or gs:// place to put into jax_extract/data/ on every VM; may be given again'
)
read_flags "$@"
check_slice
check_setup

copy_project() {
  local folder=${XDG_CACHE_HOME:-$HOME/.cache}/jax_extract
  local archive=$folder/$name.tar.gz
  if [[ $dry_run == False && $revision == HEAD && -n $(git -C "$root" status --porcelain) ]]; then
    say 'note: what is not committed is not copied'
  fi
  run mkdir -p "$folder"
  run git -C "$root" archive --format=tar.gz "--output=$archive" "$revision"
  to_workers "$archive" jax_extract.tar.gz
  on_workers all 'mkdir -p jax_extract && tar --extract --gzip --file=jax_extract.tar.gz --directory=jax_extract'
}

clone_project() { # also where it is cloned already
  local git='git -C jax_extract'
  on_workers all "git init --quiet jax_extract && $git fetch --quiet --depth=1 $(quoted "$repository" "$revision") \
&& $git checkout --quiet --force --detach FETCH_HEAD"
}

if [[ -z $repository ]]; then
  copy_project
else
  clone_project
fi
on_workers all 'exec jax_extract/launch/tpu_pod/on_worker/setup.sh'
for place in "${data[@]}"; do
  if [[ $place == gs://* ]]; then
    on_workers all "gcloud storage cp --recursive --no-clobber $(quoted "$place") jax_extract/data/"
  else
    to_workers "$place" jax_extract/data/
  fi
done
