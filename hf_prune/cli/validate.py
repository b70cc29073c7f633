"""`hf-prune validate`."""

from __future__ import annotations

from typing import Annotated

import typer


def validate(
    recipe: Annotated[str, typer.Argument(help="A recipe's path, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to set.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes for editors.")] = False,
) -> None:
    """Check a recipe, and say all mistakes at once. Reads no model.

    Examples:

        hf-prune validate my.yaml

        hf-prune validate my.yaml prune.0.sparsity=0.3
    """
    from hf_prune.recipe import Recipe
    from hf_prune.recipe.shipped import find_recipe

    checked = Recipe.from_yaml(find_recipe(recipe), overrides or ())
    targets = ", ".join(step.target for step in checked.prune)
    typer.echo(f"{checked.name or recipe} is a good recipe: {len(checked.prune)} steps ({targets})")
