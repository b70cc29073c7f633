"""The census and the proof over every model type, and the page they make: python scripts/support.py

Each type's row in tests/reach/results.json is replaced as soon as it was tried, so that a run that was broken off goes on where
it was, several may run side by side, and a part (`--types`) renews its rows alone. `--page` only writes the page.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
import warnings
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "reach" / "results.json")
    parser.add_argument("--types", nargs="*", help="these model types alone, whatever they were tried with")
    parser.add_argument("--scopes", nargs="*", default=["global", "layer"])
    parser.add_argument("--census", action="store_true", help="only add the types that tests/reach/census.json lacks")
    parser.add_argument("--page", action="store_true", help="write docs/support.md from what is there")
    parser.add_argument("--quick", action="store_true", help="don't save, generate, train, nor call `prune_` itself")
    options = parser.parse_args()
    if options.census:
        count(options.types)
        return
    if not options.page:
        run(options)
    from tests.reach.page import write

    write(options.results)


def count(types: list[str] | None) -> None:
    """Add what a watched run of each type finds to the census; what the file says already stays."""
    quiet()
    from tests.reach.census import add, census, seen
    from tests.reach.zoo import NotBuildable, build, model_types

    for model_type in types or model_types():
        if model_type not in census()["types"]:
            try:
                add(model_type, seen(build(model_type)))
            except NotBuildable as reason:
                print(reason, flush=True)
            except Exception as error:  # of models' own code, of any kind; `not built` says it on the page
                print(model_type, type(error).__name__, " ".join(str(error).split())[:200], flush=True)


def quiet() -> None:
    """One thread, and no word of the libraries below."""
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def run(options: argparse.Namespace) -> None:
    quiet()
    from tests.reach.results import Row, put, read, sources
    from tests.reach.zoo import model_types

    now = sources()
    # in an order by chance, the same each time, so that a part of a run says something of all
    for model_type in options.types or sorted(model_types(), key=lambda name: hashlib.md5(name.encode()).digest()):
        if not options.types and (row := read(options.results).get(model_type)) and row.sources == now:
            continue
        started = time.process_time()
        row = Row.of(model_type, options.scopes, quick=options.quick)
        put(model_type, row, options.results)
        said = [f"{target} {outcome}" for target, outcome in row.outcomes.items() if outcome not in ("proven", "none")]
        print(model_type, f"{time.process_time() - started:.1f} s", row.not_built or "; ".join(said), flush=True)


if __name__ == "__main__":
    main()
