#!/usr/bin/env bash
# The tests: ./scripts/test.sh runs what CI runs, ./scripts/test.sh --full everything. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
make_environment dev

selection=(-m "not slow")
if [[ "${1:-}" == "--full" ]]; then
    selection=()
    shift
fi
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest -q -n 2 "${selection[@]}" "$@"
