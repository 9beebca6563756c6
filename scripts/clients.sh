#!/usr/bin/env bash
# Install the clients that tests/clients runs, each in an environment of its own, in the versions that
# were tested: 3 GB, most of it GuideLLM's torch.
#   bash scripts/clients.sh DIR && STARS_CLIENTS=DIR pytest tests/clients
# `vllm bench serve` is run, too, where vLLM 0.32 is: on PATH, or in an environment at DIR/vllm.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" && cd "$1"

environment() {
  local name=$1
  shift
  python3 -m venv "$name"
  "$name/bin/pip" install -q "$@"
}

environment langchain langchain-openai==1.7.4
environment litellm 'litellm[proxy]==1.108.7'
environment lm-eval -c "$repository/constraints.txt" 'lm-eval[api]==0.4.13' transformers
environment guidellm -c "$repository/constraints.txt" guidellm==0.8.1
if command -v npm; then
  mkdir -p javascript && cd javascript
  npm install --no-save --silent openai@6.49.0 ai@6.0.326 @ai-sdk/openai@3.0.141 \
    @ai-sdk/openai-compatible@2.0.92 zod
fi
