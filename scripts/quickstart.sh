#!/usr/bin/env bash
# The main job: fine-tunes MiniLM on BBC News while pruning it, and prints dense beside pruned.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
make_environment demo
exec .venv/bin/hf-prune run recipes/quickstart.yaml "$@"
