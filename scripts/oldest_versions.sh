#!/usr/bin/env bash
# Runs the tests on the oldest torch, triton and transformers that pyproject.toml allows, and on
# Python 3.12, part by part; each part's output goes to DIR/logs.
#   bash scripts/oldest_versions.sh DIR [engine models ...]    (all parts of tests/, if none is named)
# An environment and a copy of the checkout go to DIR: 6 GB, as PyPI's torch brings CUDA's libraries.
set -euo pipefail
if [ $# = 0 ]; then
  echo "usage: $0 DIR [PART ...]" >&2
  exit 2
fi
mkdir -p "$1/checkout" "$1/logs"
dir=$(realpath "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(.ci/find_python 3.12)
if [ -z "$python" ]; then
  echo "no Python 3.12 on this machine" >&2
  exit 1
fi
git ls-files --cached --others --exclude-standard -z \
  | tar --create --null --files-from=- --ignore-failed-read | tar --extract --directory "$dir/checkout"
cd "$dir/checkout"

# Of this transformers, huggingface_hub is an older one. Triton 3.6's interpreter takes arrays of one
# element for numbers, which numpy 2.4 refuses.
{
  grep -vE '^(torch|triton|transformers|huggingface_hub|numpy)==' constraints.txt
  printf '%s\n' torch==2.11.0 triton==3.6.0 transformers==5.17.0 'numpy<2.4'
} >"$dir/constraints.txt"
[ -x "$dir/venv/bin/python" ] || "$python" -m venv "$dir/venv"
export PATH=$dir/venv/bin:$PATH CI=true
pip install -q -c "$dir/constraints.txt" -e '.[test]'

if [ $# = 0 ]; then
  cd tests
  # shellcheck disable=SC2046
  set -- $(find . -mindepth 2 -name 'test_*.py' -printf '%P\n' | cut -d/ -f1 | sort -u) test_*.py
  cd ..
fi
failed=()
for part; do
  # What those versions say of each other, and numpy 2.3 of Triton, is no error of ours.
  python -m pytest -q -W default::DeprecationWarning "tests/$part" >"$dir/logs/${part//\//-}" 2>&1 \
    || failed+=("$part")
  echo "$part: $(tail -n 1 "$dir/logs/${part//\//-}")"
done
echo "failed: ${failed[*]:-nothing}"
[ ${#failed[@]} = 0 ]
