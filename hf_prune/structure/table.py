"""`print(inspect_model(model))`."""

from __future__ import annotations

import io
from itertools import groupby

from rich.console import Console
from rich.table import Table

from hf_prune.structure.sites import ModelStructure, Site


def structure_table(structure: ModelStructure) -> str:
    """Plain text: a row for each run of alike sites, then what is refused and why."""
    table = Table()
    for column in ("target", "site", "sites", "units each"):
        table.add_column(column, justify="right" if column in ("sites", "units each") else "left", overflow="fold")

    def alike(site: Site) -> tuple[str, int, str]:
        return site.kind, site.n_units, _without_numbers(site.name)

    for (target, n_units, pattern), run in groupby(sorted(structure.sites, key=alike), key=alike):
        table.add_row(target, pattern, str(len(list(run))), str(n_units))
    entries = sum(_size(site.shape) for site in structure.weights)
    table.add_row("weights", f"{entries:,} entries", str(len(structure.weights)), "")
    buffer = io.StringIO()
    console = Console(file=buffer, width=400)  # more than names need, so that none is broken
    # not as the table's title, which is broken where the table is narrow
    console.print(
        f"{structure.model_class}: {structure.n_parameters:,} parameters, {_macs(structure)}", soft_wrap=True
    )
    console.print(table)
    stay = {
        (site.kind, number, _without_numbers(site.name), reason)
        for site in structure.sites
        for number, reason in site.fixed
    }
    for target, number, name, reason in sorted(stay):
        console.print(f"has to stay: {number} of the {target} of {name}: it {reason}", soft_wrap=True, markup=False)
    reasons = sorted(
        {(refusal.kind, _without_numbers(refusal.name), refusal.reason) for refusal in structure.refusals}
    )
    for target, name, reason in reasons:
        console.print(f"refused: {target} of {name}: {reason}", soft_wrap=True, markup=False)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def _macs(structure: ModelStructure) -> str:
    if structure.macs is None:
        return "MACs not counted"
    name, shape = next(iter(structure.macs_of.items()))
    return f"{structure.macs:,} MACs ({name} {' × '.join(map(str, shape))})"


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
