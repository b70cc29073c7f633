"""`hf-prune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a pruned model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as it is stored.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what left (.png, .svg, .pdf); needs Matplotlib.")
    ] = None,
) -> None:
    """Show the report of a pruned model: what left, what was measured, on what.

    Examples:

    ```
    hf-prune report outputs/quickstart
    hf-prune report outputs/quickstart --json | jq .measured
    hf-prune report outputs/quickstart --picture left.png
    ```
    """
    from hf_prune.report import PruningReport
    from hf_prune.report.report import plain_console

    found = PruningReport.from_json(directory / "pruning_report.json")
    if picture is not None:
        from hf_prune.report.picture import draw

        draw(found.to_dict(), picture)
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        found.print_to(plain_console())
