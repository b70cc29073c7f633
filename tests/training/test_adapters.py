"""LoRA by PEFT while pruning: (W + B A) ⊙ mask is what is trained, what is merged, and what is zero."""

import copy

import pytest
import torch
from torch.utils.data import Dataset

import hf_prune
from hf_prune.apply.masks import masks_of
from hf_prune.errors import RecipeError
from tests import zoo
from tests.training.data import Tokens, arguments
from tests.training.test_trainer import weights_equal


peft = pytest.importorskip("peft")

RECIPE = {
    "version": 1,
    "prune": [{"target": "ffn_neurons", "sparsity": 0.5}, {"target": "weights", "sparsity": 0.5}],
    "schedule": {"name": "linear", "begin": 0.1, "end": 0.5, "updates": 2},
    "calibration": {"samples": 4, "batch_size": 4},
}
TARGETS = {"bert": ["query", "value", "dense"], "llama": ["q_proj", "v_proj", "down_proj", "up_proj"]}
KINDS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}


def adapted(name, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type=KINDS[name], r=4, target_modules=TARGETS[name], **options)
    model = peft.get_peft_model(zoo.build(name), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # zero at first: then A has no gradient, and merging nothing to change
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


class Text(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(3, 99, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def run(directory, name, recipe=RECIPE, model=None, **options):
    data = Tokens(16) if name == "bert" else Text()
    args = arguments(directory, max_steps=8, learning_rate=0.01, **options)
    model = model or adapted(name, lora_dropout=0.1)
    return hf_prune.PruningTrainer(model=model, args=args, train_dataset=data, recipe=recipe)


def batch_of(data):
    rows = [data[n] for n in range(4)]
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_merging_changes_nothing_and_zeros_stay(name):
    """Against the weights made by hand: (W + s B A) ⊙ mask in a model without adapters."""
    model = adapted(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    pruner = hf_prune.Pruner(model, optimizer, RECIPE, n_steps=6)
    batch = batch_of(Tokens(16) if name == "bert" else Text())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    for _ in range(6):
        model(**batch).loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert pruner.is_final
    masks = masks_of(pruner.model)
    assert masks.weights and masks.units
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in frozen:
            kept = parameter != 0
            assert torch.equal(parameter[kept], frozen[parameter_name][kept]), (
                "frozen weights are masked, never changed"
            )
    by_hand = zoo.build(name)
    expected = {}
    for module_name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            full = frozen[f"base_model.model.{module_name}.base_layer.weight"] + module.scaling["default"] * b @ a
            expected[f"{module_name}.weight"] = full.detach()
    structure = hf_prune.inspect_model(by_hand)
    with torch.no_grad():
        for weight_name, full in expected.items():
            by_hand.get_parameter(weight_name).copy_(full)
        if name == "bert":
            whole = model.get_base_model().classifier.modules_to_save["default"]
            by_hand.classifier.load_state_dict(whole.state_dict())
    hf_prune.apply_(by_hand, hf_prune.PruningPlan(steps=[masks]))
    assert structure.weights
    model.eval(), by_hand.eval()
    with torch.no_grad():
        trained, reference = model(**batch).logits, by_hand(**batch).logits
    assert torch.allclose(trained, reference, atol=1e-5)
    report = pruner.finish(verify=True)
    merged = pruner.model.eval()
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, trained, atol=1e-5)
    assert type(merged) is type(by_hand) and not any("lora" in n for n, _ in merged.named_parameters())
    left = masks_of(merged).weights
    assert left and all(not merged.get_parameter(n)[~keep].any() for n, keep in left.items())
    assert report.to_dict()["sparsity"]["ffn_neurons"] == 0.5


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resuming(tmp_path, stop):
    whole = run(tmp_path / "whole", "bert", save_strategy="steps", save_steps=stop)
    whole.train()
    assert type(whole.model).__name__ == "BertForSequenceClassification"
    rest = run(tmp_path / "rest", "bert")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert weights_equal(rest.model, whole.model)
    assert masks_of(rest.model) == masks_of(whole.model)


def test_the_gradient_is_that_of_the_masked_weight():
    model = adapted("bert")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pruner = hf_prune.Pruner(model, optimizer, {**RECIPE, "schedule": {"name": "one_shot", "begin": 0}}, n_steps=4)
    pruner.step()
    layer = model.get_base_model().bert.encoder.layer[0].attention.self.query
    keep = masks_of(pruner.model).weights["bert.encoder.layer.0.attention.self.query.weight"]
    x = torch.randn(5, 32)
    layer(x).square().sum().backward()
    a, b = (copy.deepcopy(module["default"].weight) for module in (layer.lora_A, layer.lora_B))
    full = (layer.base_layer.weight + layer.scaling["default"] * b @ a) * keep
    (x @ full.T + layer.base_layer.bias).square().sum().backward()
    assert torch.allclose(layer.lora_A["default"].weight.grad, a.grad, rtol=1e-3, atol=1e-4)
    assert torch.allclose(layer.lora_B["default"].weight.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_what_does_not_go_with_adapters():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    dora = adapted("bert", use_dora=True)
    with pytest.raises(RecipeError, match="one plain LoRA adapter"):
        hf_prune.Pruner(dora, optimizer, RECIPE, n_steps=4)
    model = adapted("bert")
    for changes in (
        {"schedule": {"rewind": 0}},
        {"prune": [{"target": "ffn_neurons", "sparsity": 0.5, "compensation": "bias"}]},
    ):
        with pytest.raises(RecipeError, match="the weights below adapters are frozen"):
            hf_prune.Pruner(model, optimizer, {**RECIPE, **changes}, n_steps=4)
    embedded = peft.get_peft_model(zoo.build("bert"), peft.LoraConfig(target_modules=["word_embeddings"]))
    with pytest.raises(RecipeError, match="adapted by Embedding"):
        hf_prune.Pruner(embedded, optimizer, RECIPE, n_steps=4)
