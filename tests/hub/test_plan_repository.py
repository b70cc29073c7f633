"""A plan by itself: a small repository, applied to the weights that it was made for and to no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import BertForSequenceClassification

import hf_prune
from hf_prune.errors import CheckpointError, PruneError
from tests import zoo
from tests.hub.pruned import UNEVEN, logits
from tests.hub_metadata import check_card


BASE, REPO = "ada/base", "ada/plan"


@pytest.fixture
def model(hub):
    zoo.build("bert").push_to_hub(BASE, private=False)
    return BertForSequenceClassification.from_pretrained(BASE).eval()


def pruned_by(plan, model):
    hf_prune.apply_(model, plan)
    hf_prune.shrink_(model)
    return logits(model)


def test_the_plan_alone_makes_the_same_model_from_its_base(model, hub, api):
    plan = hf_prune.make_plan(model, UNEVEN)
    assert plan.push_to_hub(REPO, model) == f"{hub.url}/{REPO}"
    files = set(api.list_repo_files(REPO)) - {".gitattributes"}
    assert files == {"README.md", "pruning_plan.json", "pruning_plan.safetensors", "recipe.yaml"}
    assert api.model_info(REPO).private and len(api.list_repo_commits(REPO)) == 2
    card = ModelCard.load(REPO)
    assert check_card(card.content) == ([], []) and card.data.base_model == BASE
    assert hf_prune.Recipe.from_pretrained(REPO).name == "uneven"
    program = card.text.split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(program, found)  # what the card tells to do
    assert torch.equal(logits(found["model"]), pruned_by(plan, model))
    assert found["plan"].masks == plan.masks


def test_replacements_travel_and_leave_with_the_plan_that_had_them(model, hub, api):
    recipe = {"version": 1, "prune": [{"target": "weights", "sparsity": 0.5, "criterion": "sparsegpt"}]}
    batches = [{"input_ids": torch.randint(3, 90, (4, 12))} for _ in range(4)]
    plan = hf_prune.make_plan(model, recipe, calibration=batches)
    assert plan.replacements
    plan.push_to_hub(REPO, model)
    again = hf_prune.PruningPlan.from_pretrained(REPO)
    base = again.load_base().eval()
    hf_prune.apply_(base, again)
    expected = BertForSequenceClassification.from_pretrained(BASE).eval()
    hf_prune.apply_(expected, plan)
    assert torch.equal(logits(base), logits(expected))
    hf_prune.make_plan(model, UNEVEN).push_to_hub(REPO, model)
    assert "pruning_replacements.safetensors" not in api.list_repo_files(REPO)


def test_other_weights_are_refused_and_stay(model, hub):
    hf_prune.make_plan(model, UNEVEN).push_to_hub(REPO, model)
    plan = hf_prune.PruningPlan.from_pretrained(REPO)
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3  # of all weights this one
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PruneError, match=rf"made for the weights of {BASE} at \w{{40}}.*load_base"):
        hf_prune.apply_(model, plan)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_base_is_loaded_at_the_commit_it_was_made_for(model, hub):
    plan = hf_prune.make_plan(model, UNEVEN)
    plan.push_to_hub(REPO, model)
    other = zoo.build("bert")
    with torch.no_grad():
        other.classifier.weight.add_(1)
    other.push_to_hub(BASE)
    again = hf_prune.PruningPlan.from_pretrained(REPO)
    assert torch.equal(pruned_by(again, again.load_base().eval()), pruned_by(plan, model))


def test_less_precise_files_loaded_in_float32_have_the_same_hash(model):
    from hf_prune.plan_repository import weights_digest

    half = model.to(torch.bfloat16)
    assert weights_digest(half) == weights_digest(half.to(torch.float32))


def test_branches_and_pull_requests(model, hub, api):
    plan = hf_prune.make_plan(model, UNEVEN)
    assert plan.push_to_hub(REPO, model, revision="draft") == f"{hub.url}/{REPO}/tree/draft"
    assert hf_prune.PruningPlan.from_pretrained(REPO, revision="draft").masks == plan.masks
    assert plan.push_to_hub(REPO, model, create_pr=True) == f"{hub.url}/{REPO}/discussions/1"
    with pytest.raises(CheckpointError, match=r"no Hub repository with a pruning_plan\.json|no .*pruning_plan\.json"):
        hf_prune.PruningPlan.from_pretrained(REPO)


def test_what_can_not_be_pushed_is_told(hub):
    model = zoo.build("bert")
    plan = hf_prune.make_plan(model, UNEVEN)
    with pytest.raises(PruneError, match="base_model='owner/name'"):
        plan.push_to_hub(REPO, model)
    with pytest.raises(PruneError, match="made for a Bert"):
        plan.push_to_hub(REPO, zoo.build("llama"), base_model=BASE)
    with pytest.raises(PruneError, match="to 'ada/base' failed: the Hub answered 404"):
        plan.push_to_hub(REPO, model, base_model=BASE)
    with pytest.raises(PruneError, match="answered 401") as caught:
        plan.push_to_hub(REPO, model, base_model=BASE, token="hf_" + "S3cr3tS3cr3t")
    assert "S3cr3t" not in str(caught.value)
    with pytest.raises(CheckpointError, match="'ada/none' is no directory"):
        hf_prune.PruningPlan.from_pretrained("ada/none")


@pytest.mark.parametrize("name", ["AutoTokenizer", "pipeline", "os", "__builtins__", None])
def test_a_plan_names_models_of_transformers_and_nothing_else(model, hub, tmp_path, name):
    hf_prune.make_plan(model, UNEVEN).save(tmp_path)
    content = json.loads((tmp_path / "pruning_plan.json").read_text())
    content["model"] |= {"class": name, "base_model": BASE, "commit": None}
    Path(tmp_path / "pruning_plan.json").write_text(json.dumps(content))
    with pytest.raises(PruneError, match="which Transformers doesn't have"):
        hf_prune.PruningPlan.from_pretrained(tmp_path).load_base()
