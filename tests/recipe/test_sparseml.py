"""Recipes of SparseML and llm-compressor: carried over exactly, or refused with all that can't be."""

import pytest
import torch

import hf_prune
from hf_prune import Recipe, RecipeError
from tests import zoo


GRADUAL = """
# a page around it, as they have them

---
num_epochs: &num_epochs 10
init: 0.05

training_modifiers:
  - !EpochRangeModifier
      start_epoch: 0.0
      end_epoch: *num_epochs

pruning_modifiers:
  - !GMPruningModifier
      params:
        - re:bert.encoder.layer.*.attention.self.query.weight
        - bert.encoder.layer.0.intermediate.dense.weight
      init_sparsity: eval(init)
      final_sparsity: 0.8
      start_epoch: 2.0
      end_epoch: 8
      update_frequency: 1.0
      inter_func: cubic
      leave_enabled: True
      mask_type: unstructured
---

More of the page.
"""


def test_a_gradual_one_is_zhu_and_gupta_from_its_initial_sparsity():
    recipe = Recipe.from_sparseml(GRADUAL)
    assert recipe.training == {"num_train_epochs": 10.0}
    assert {step.include for step in recipe.prune} == {
        ("bert.encoder.layer*.attention.self.query", "bert.encoder.layer.0.intermediate.dense")
    }
    model = zoo.build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = hf_prune.Pruner(model, optimizer, recipe, n_steps=100)
    names = [f"bert.encoder.layer.{n}.attention.self.query.weight" for n in range(3)]
    names.append("bert.encoder.layer.0.intermediate.dense.weight")
    for step in range(1, 101):
        pruner.step()
        t = min(max((step // 10 * 10 - 20) / 60, 0.0), 1.0)
        expected = 0.8 + (0.05 - 0.8) * (1 - t) ** 3 if step >= 20 else 0.0
        for name in names:
            weight = model.get_parameter(name)
            assert int((weight == 0).sum()) == pytest.approx(expected * weight.numel(), abs=2), (step, name)
    zero = {name for name, parameter in model.named_parameters() if name.endswith("weight") and (parameter == 0).any()}
    assert zero - set(names) <= {"bert.embeddings.word_embeddings.weight"}, (
        "a padding token's row is zero from the start"
    )


ONE_SHOT = """
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      sequential_update: true
      dampening_frac: 0.02
      block_size: 64
      targets: ['re:model.layers.\\d*$']
      ignore: ['re:.*lm_head', 're:.*down_proj']
finetuning_stage:
  run_type: train
  finetuning_modifiers:
    ConstantPruningModifier:
      targets: ['re:.*q_proj.weight']
      start: 0
"""


def test_a_one_shot_one():
    # stages: `run_type` is what calls it, which here is up to whoever takes the recipe
    recipe = Recipe.from_sparseml(ONE_SHOT)
    (step,) = recipe.prune
    assert (step.criterion.name, step.criterion.options) == ("sparsegpt", {"block": 64, "damping": 0.02})
    assert (step.pattern.n, step.pattern.m) == (2, 4)
    model = zoo.build("llama")
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 99, (2, 8), generator=generator)} for _ in range(2)]
    hf_prune.prune_(model, recipe, calibration=batches)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            halves = bool(((module.weight.reshape(-1, 4) == 0).sum(1) == 2).all())
            assert halves == ("layers" in name and "down_proj" not in name), name


def test_wanda_with_owl_and_dropped_layers():
    text = """
test_stage:
  pruning_modifiers:
    - WandaPruningModifier: {sparsity: 0.6, sparsity_profile: owl, owl_m: 7, owl_lmbda: 0.1, targets: [Linear], ignore: [lm_head]}
    - LayerPruningModifier: {layers: [model.layers.4, model.layers.1], start_epoch: -1.0, end_epoch: -1.0}
"""
    wanda, layers = Recipe.from_sparseml(text).to_dict()["prune"]
    assert (wanda["criterion"], wanda["sparsity"], wanda["scope"]) == ("wanda", 0.6, "output")
    assert wanda["allocation"] == {"name": "owl", "multiple": 7, "spread": 0.1}
    assert (layers["target"], layers["remove"]) == ("layers", [1, 4])


def test_global_and_blocks():
    modifier = "init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 1, update_frequency: 0.5"
    text = f"modifiers:\n  - !GlobalMagnitudePruningModifier {{{modifier}, params: __ALL_PRUNABLE__, mask_type: block4}}\n"
    (step,) = Recipe.from_sparseml(text, epochs=2).prune
    assert (step.scope, step.pattern.block, step.sparsity) == ("global", (1, 4), 0.5)
    assert (step.schedule.begin, step.schedule.end, step.schedule.updates) == (0.0, 0.5, 2)


def test_all_that_can_not_be_carried_over_is_told_at_once():
    text = """
modifiers:
  - !SetLearningRateModifier {learning_rate: 0.1}
  - !GMPrunningModifier {params: x}
  - !GMPruningModifier
      params: ['re:.*(query|key).weight', '__ALL__']
      init_sparsity: 0.9
      final_sparsity: 0.5
      start_epoch: eval(2 * x)
      end_epoch: 20
      update_frequency: -1
      leave_enabled: False
      mask_type: filter
      surprise: 3
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 10}
quantization_modifiers:
  - !QuantizationModifier {start_epoch: 1}
  - WandaPruningModifier: {sparsity: 2, mask_structure: "1:4", sequential_update: false}
"""
    with pytest.raises(RecipeError) as caught:
        Recipe.from_sparseml(text)
    said = str(caught.value)
    for part in (
        "SetLearningRateModifier: no pruning that is known here",
        "did you mean 'GMPruningModifier'",
        "'re:.*(query|key).weight' can't be said as a glob",
        "'__ALL__' can't be said",
        "eval(2 * x) is not evaluated",
        "end_epoch: 20 is after the end of training at 10",
        "update_frequency: -1",
        "leave_enabled: False",
        "mask_type: 'filter'",
        "surprise: 3 has no counterpart",
        "QuantizationModifier: no pruning",
        "WandaPruningModifier.sparsity: 2",
        "mask_structure: '1:4'",
        "sequential_update: False",
    ):
        assert part in said, part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modifiers:\n  - !!python/object/apply:os.system ['true']\n", "not a recipe"),
        ("- a\n- b\n", "expected keys such as modifiers"),
        ("num_epochs: 3\nx: 1\n", "holds no modifier"),
        ("modifiers:\n  - 3\n", "expected modifiers with their options"),
        ("modifiers: [\n", "not a recipe"),
        ("modifiers:\n  - !ConstantPruningModifier {params: __ALL_PRUNABLE__}\n", "here masks say what has left"),
        ("no/such/recipe.yaml", "can't read 'no/such/recipe.yaml'"),
        (3, "expected the path of a recipe or its text"),
        (
            "modifiers:\n  - !GMPruningModifier {init_sparsity: 0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 1, "
            "update_frequency: 1, params: __ALL_PRUNABLE__}\n",
            "pass epochs=",
        ),
    ],
)
def test_bad_input(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_sparseml(text)
