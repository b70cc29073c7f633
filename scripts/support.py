"""The census and the proof over every model type, and the page they make: python scripts/support.py

Results are kept as they come in outputs/reach.jsonl, so that a run that was broken off goes on; --page only writes the page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "outputs" / "reach.jsonl")
    parser.add_argument("--types", nargs="*", help="these model types alone")
    parser.add_argument("--scopes", nargs="*", default=["global", "layer"])
    parser.add_argument("--census", action="store_true", help="only add the types that tests/reach/census.json lacks")
    parser.add_argument("--page", action="store_true", help="write docs/support.md from what is there")
    parser.add_argument("--quick", action="store_true", help="don't save, generate, train, nor call `prune_` itself")
    options = parser.parse_args()
    if options.census:
        count(options.types)
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
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
    torch.set_num_threads(1)


def run(options: argparse.Namespace) -> None:
    quiet()
    from tests.reach import proof
    from tests.reach.census import reviewed, seen
    from tests.reach.zoo import NotBuildable, build, model_types

    done = {json.loads(line)["type"] for line in options.results.open()} if options.results.exists() else set()
    # in an order by chance, the same each time, so that a part of a run says something of all
    for model_type in options.types or sorted(model_types(), key=lambda name: hashlib.md5(name.encode()).digest()):
        if model_type in done:
            continue
        row: dict = {"type": model_type, "outcomes": {}}
        started = time.process_time()
        try:
            built = build(model_type)
            row["class"] = type(built.model).__name__
            row["census"] = seen(built)
            subject = proof.Subject.of(built, quick=options.quick)
            row["dtype"], row["can"] = str(next(subject.model.parameters()).dtype), subject.can
            held = reviewed(model_type) or row["census"]
            for target in proof.TARGETS:
                for scope in options.scopes:
                    row["outcomes"][f"{target} {scope}"] = proof.prove(subject, target, scope, held)
            if not options.quick:
                found = [t for t in proof.TARGETS if "proven" in row["outcomes"][f"{t} {options.scopes[0]}"]]
                if found:
                    key = f"{found[0]} {options.scopes[0]}"
                    said = proof.one_shot(subject, found[0])
                    row["outcomes"][key] = row["outcomes"][key] if said == "proven" else said
        except NotBuildable as reason:
            row["not built"] = str(reason)
        except Exception as error:
            row["not built"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row["seconds"] = round(time.process_time() - started, 2)
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(model_type, row["seconds"], row.get("not built", ""), flush=True)


if __name__ == "__main__":
    main()
