"""`hf-prune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a pruned model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as it is stored.")] = False,
) -> None:
    """Show the report of a pruned model: what left, what was measured, on what.

    Examples:

    ```
    hf-prune report outputs/quickstart
    hf-prune report outputs/quickstart --json | jq .measured
    ```
    """
    from hf_prune.report import PruningReport
    from hf_prune.report.report import plain_console

    found = PruningReport.from_json(directory / "pruning_report.json")
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        found.print_to(plain_console())
