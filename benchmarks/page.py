"""docs/benchmarks.md from the figures of quality.py and rivals.py.

python benchmarks/page.py benchmarks/results/quality.json benchmarks/results/rivals.json --tried benchmarks/results/tried.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import common
import typer


PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEADINGS = (common.WEIGHTS, common.N_OF_M, common.STRUCTURED, common.TENTH_OF_LAYERS, common.FIFTH_OF_LAYERS)
TEXT = """# Benchmarks

What one-shot pruning costs a small language model, SmolLM2-135M-Instruct: hf_prune beside other tools, from the same weights, on
the same token windows. This page is written by its last command from the figures of the others, which are in
[benchmarks/results](../benchmarks/results).

```bash
python benchmarks/quality.py --inputs outputs/benchmark --json benchmarks/results/quality.json
python benchmarks/rivals.py --inputs outputs/benchmark --json benchmarks/results/rivals.json
python benchmarks/quality.py --windows 64 --inputs outputs/benchmark-64 --json benchmarks/results/tried.json tried
python benchmarks/page.py benchmarks/results/quality.json benchmarks/results/rivals.json --tried benchmarks/results/tried.json
```

The second runs in an environment of its own; [its head](../benchmarks/rivals.py) says what to install.

{notes}
- Perplexity: the dense model's, below as a multiple of that in the same run. "all" is of all evaluation tokens together.
- Zeros: of the weights of all matrices but embeddings and output head. They make nothing smaller or faster.
- Calibration goes through the models in batches of 8 windows (hf_prune runs pieces of two), in llm-compressor of one, its default.
- The rows were measured at several commits, while other work ran on the machine, which makes CPU seconds larger, in no row by as much as in
  another: take them as upper bounds. Perplexities don't depend on that. The two rows of Wanda at 50 % were measured one after the other, with
  one other process on the second core. `sparsegpt-paper`, `sparsegpt-paper, offload disk` and `neurons-greedy` were measured on a slower day
  than the others: the first with nothing else running, the other two beside one to three jobs. `llm-neurons` and `llm-neurons-uniform`
  ran beside each other.
- `llm-neurons-uniform` and `llm-neurons` end with `reconstruct`, which is gradient descent: block by block, on the same windows of calibration,
  without labels. `neurons-uniform-refitted` is the first in closed form alone; `neurons-refitted` is in closed form too, and its layers have
  no bounds.
- llm-compressor's magnitude modifier applies its masks after optimizer steps, so in one shot it removes nothing.
- CPU seconds are user and system time of the pruning alone, with what a tool checks by itself (hf_prune compares the smaller model with
  the masked one), without loading and evaluating. Peak memory is of a process that does nothing else, until it has pruned.
"""
TRIED = """## What else was tried for 20 % of the parameters

On {windows} windows of calibration, so that these rows compare with each other only. All are hf_prune's, each with its repair.

{table}"""
SMOKE = 32  # windows of calibration


def main(
    files: Annotated[list[Path], typer.Argument(help="JSON files of one model and the same windows.", exists=True)],
    tried: Annotated[
        Path | None, typer.Option(help="JSON file of another run, on windows of its own.", exists=True)
    ] = None,
    to: Annotated[Path, typer.Option(help="The page.")] = PAGE,
) -> None:
    """Write the page."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    to.write_text(page(runs, tried and json.loads(tried.read_text(encoding="utf-8"))), encoding="utf-8")


def page(runs: list[dict], tried: dict | None = None) -> str:
    if differing := [run for run in runs if run["inputs"] != runs[0]["inputs"]]:
        raise SystemExit(
            f"runs on other inputs don't compare: {runs[0]['inputs'][:12]} and {differing[0]['inputs'][:12]}; "
            "give rivals.py the directory that quality.py wrote"
        )
    names, dense_lines, tables = [], [], {heading: [] for heading in HEADINGS}
    for run in runs:
        ours = "hf_prune " if "hf_prune" in run["packages"] else ""
        header, dense, *lines = common.cells(run["rows"])
        dense_lines.append([f"dense, transformers {run['packages']['transformers']}", *dense[1:]])
        for (name, row), line in zip(list(run["rows"].items())[1:], lines, strict=True):
            tables.setdefault(row["heading"], []).append([ours + name, *line[1:]])
            names += [f"- {ours}{name}: `{json.dumps(row['steps'])}`"] if "steps" in row else []
    parts = [TEXT.format(notes="\n".join(_notes(runs))), _table(header, dense_lines)]
    parts += [
        f"## {heading[0].upper()}{heading[1:]}\n\n{_table(header, lines)}"
        for heading, lines in tables.items()
        if lines
    ]
    if tried:
        header, _, *lines = common.cells(tried["rows"])
        names += [f"- {name}: `{json.dumps(row['steps'])}`" for name, row in tried["rows"].items() if "steps" in row]
        parts += [TRIED.format(windows=tried["windows"]["calibration"], table=_table(header, lines))]
    parts += ["## Recipes\n\nThe steps of hf_prune's methods:\n\n" + "\n".join(names) + "\n"]
    return "\n".join(parts)


def _notes(runs: list[dict]) -> list[str]:
    calibration, *texts = ("calibration", *(name for name in runs[0]["windows"] if name != "calibration"))
    windows, origin = runs[0]["windows"], runs[0]["origin"]
    notes = []
    if windows[calibration] < SMOKE:
        notes += [
            f"- **A smoke run:** {windows[calibration]} windows of calibration show that the methods run, not how good they are."
        ]
    notes += [f"- Calibration: {windows[calibration]} windows of {common.LENGTH} tokens, {origin[calibration]}."]
    notes += [f"- Evaluation, {name}: {windows[name]} windows, {origin[name]}." for name in texts]
    for run in runs:
        packages = ", ".join(f"{name} {number}" for name, number in run["packages"].items())
        notes += [f"- {packages}, on a {run['hardware']}."]
    return notes


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


if __name__ == "__main__":
    typer.run(main)
