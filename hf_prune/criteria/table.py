"""Which criterion is defined for which target. Data only: recipes are checked against it before anything is loaded."""

EVERY_TARGET = frozenset({"weights", "ffn_neurons", "attention_heads", "layers"})

CRITERION_TARGETS: dict[str, frozenset[str]] = {
    "l1": EVERY_TARGET,
    "l2": EVERY_TARGET,
    "random": EVERY_TARGET,
    "gradient": EVERY_TARGET,
    "taylor": EVERY_TARGET,
    "activation": EVERY_TARGET - {"weights"},
}

# Options that a criterion takes in a recipe, by name.
CRITERION_OPTIONS: dict[str, frozenset[str]] = {name: frozenset() for name in CRITERION_TARGETS} | {
    "random": frozenset({"seed"})
}
