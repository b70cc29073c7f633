# Sourced by the scripts beside it: makes .venv with the extra named, once, and leaves $python pointing into it.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_environment() {
    local extra="$1" stamp wanted
    python=".venv/bin/python"
    if [[ ! -x "$python" ]]; then
        if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "hf_prune needs Python 3.11 or newer as python3; found: $(python3 --version 2>&1)" >&2
            exit 2
        fi
        python3 -m venv .venv
    fi
    stamp=".venv/.installed-$extra"
    wanted="$(cat pyproject.toml constraints.txt | sha256sum)"
    if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
        # torch by itself and first, at the pinned version: a range may fetch gigabytes of GPU libraries
        "$python" -m pip install --quiet "$(grep '^torch==' constraints.txt)"
        "$python" -m pip install --quiet --constraint constraints.txt --editable ".[$extra]"
        echo "$wanted" >"$stamp"
    fi
}
