"""What makes `import hf_prune` cheap: it imports next to nothing, and no model code until that is imported."""

import json
import subprocess
import sys

import pytest


def imported(program):
    """Names of the modules that `program`, which fills `before`, leaves imported beyond those."""
    program += "\nimport json\nprint(json.dumps(sorted(set(sys.modules) - before - {'json'})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_after_transformers_and_torch_it_adds_itself_alone():
    new = imported("import sys, json, transformers, torch\nbefore = set(sys.modules)\nimport hf_prune")
    assert new == {"hf_prune", "hf_prune.after_import"}


def test_once_model_code_is_there_it_adds_the_reader():
    new = imported(
        "import sys, json, torch, transformers.modeling_utils\nbefore = set(sys.modules)\nimport hf_prune\n"
    )
    assert {name.split(".")[0] for name in new} <= {"hf_prune", "torch"}
    assert "hf_prune.checkpoint.hooks" in new
    heavy = ("pipeline", "training", "report", "calibration", "cli", "job")
    assert not [name for name in new if name.split(".")[1:2] and name.split(".")[1] in heavy]


@pytest.mark.parametrize("module", ["hf_prune.recipe", "hf_prune.criteria"])
def test_a_recipe_is_checked_without_torch(module):
    new = imported(f"import sys, json\nbefore = set()\nimport {module}")
    assert "torch" not in new
    assert module in new


def test_recipes_are_listed_without_torch():
    listing = (
        "sys.argv = ['hf-prune', 'recipes']\nfrom hf_prune.cli.main import main\ntry: main()\nexcept SystemExit: pass"
    )
    new = imported(f"import sys, json\nbefore = set()\n{listing}")
    assert "torch" not in new
    assert "hf_prune.recipe.shipped" in new
