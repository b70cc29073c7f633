"""`hf-prune inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def inspect(
    model: Annotated[str, typer.Argument(help="A Hub id, a directory, or package:NAME/PATH.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print every site as JSON.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit on the Hub.")] = None,
) -> None:
    """Show what can be pruned in a model, and what can't and why. Reads the config only.

    Examples:

    ```
    hf-prune inspect HuggingFaceTB/SmolLM2-135M
    hf-prune inspect outputs/quickstart --json
    ```
    """
    from hf_prune.cli.run import quiet

    quiet()
    from hf_prune.job import meta_model
    from hf_prune.structure import inspect_model

    structure = inspect_model(meta_model(model, revision=revision, key="MODEL"))
    if not as_json:
        typer.echo(str(structure))
        return
    sites = [{"target": site.target, "name": site.name, "n_units": site.n_units} for site in structure.sites]
    weights = [{"name": site.name, "shape": list(site.shape)} for site in structure.weights]
    typer.echo(
        json.dumps(
            {
                "model_type": structure.model_type,
                "class": structure.model_class,
                "n_parameters": structure.n_parameters,
                "macs": structure.macs,
                "macs_of": structure.macs_of,
                "sites": sites,
                "weights": weights,
                "refusals": [asdict(refusal) for refusal in structure.refusals],
            },
            indent=2,
        )
    )
