#!/usr/bin/env bash
# The tests: ./scripts/test.sh runs what CI runs, ./scripts/test.sh --full everything. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
make_environment dev

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
.venv/bin/lint-imports --no-logo

if [[ "${1:-}" == "--full" ]]; then
    shift
    "$python" -m pytest -q -n 2 --dist loadfile "$@"
    # once more on the oldest versions below us, but for the wheel and the pages, which don't depend on them
    make_oldest_environment
    exec .venv-oldest/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow" --ignore tests/house --ignore tests/docs
fi
exec "$python" -m pytest -q -n 2 --dist loadfile -m "not slow" "$@"
