"""`hf-prune validate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hf_prune.errors import RecipeError


def validate(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe's path, the name of a shipped one, or a model of the Hub that has one (user/model)."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to set.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """Check a recipe, and say all mistakes at once. Reads no model.

    Examples:

    ```
    hf-prune validate my.yaml
    hf-prune validate my.yaml prune.0.sparsity=0.3
    hf-prune validate --schema > recipe.schema.json
    ```
    """
    from hf_prune.recipe import Recipe

    if schema:
        typer.echo(json.dumps(Recipe.json_schema(), indent=2, ensure_ascii=False))
        return
    if recipe is None:
        raise RecipeError("which recipe? Give a path or the name of a shipped one; `hf-prune recipes` lists those.")
    checked = Recipe.find(recipe, overrides or ())
    count = "1 step" if len(checked.prune) == 1 else f"{len(checked.prune)} steps"
    typer.echo(f"{recipe} is a good recipe: {count} ({', '.join(step.target for step in checked.prune)})")
