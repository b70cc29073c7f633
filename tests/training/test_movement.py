"""Movement in training, against a loop written plainly: what is gathered, what leaves by it, resuming, refusals."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

import hf_prune
from hf_prune import CalibrationError, Pruner, RecipeError
from hf_prune.apply.masks import masks_of
from hf_prune.errors import CheckpointError
from hf_prune.structure import inspect_model
from tests import zoo
from tests.training.data import Tokens, trainer


WEIGHTS = {"target": "weights", "sparsity": 0.6, "criterion": "movement"}
UNITS = [
    {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "movement", "scope": "global"},
    {"target": "attention_heads", "sparsity": 0.25, "criterion": "movement"},
]
SCHEDULE = {"name": "cubic", "begin": 0.2, "end": 0.8, "updates": 3}


def recipe(*steps, **schedule):
    return {"version": 1, "prune": list(steps), "schedule": {**SCHEDULE, **schedule}}


def batches(size=4):
    return list(DataLoader(Tokens(), batch_size=size))


def movement_of(pruner):
    """By site key, as it is saved."""
    return {
        name.removeprefix("movement|"): tensor
        for name, tensor in pruner.state_dict()["tensors"].items()
        if name.startswith("movement|")
    }


def train(model, optimizer, pruner, data, *, accumulate=1, clip=None, look=lambda: None):
    for n, batch in enumerate(data, 1):
        (model(**batch).loss / accumulate).backward()
        if n % accumulate:
            continue
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        pruner.step()
        look()
        optimizer.zero_grad()


class Plain:
    """Fine-tuning with movement pruning of single weights, as one would write it for one model."""

    def __init__(self, names, updates):
        self.model = zoo.build("bert").eval()  # no dropout: the two runs see the same
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.weights = {name: dict(self.model.named_parameters())[name] for name in names}
        self.scores = {name: torch.zeros(weight.shape) for name, weight in self.weights.items()}
        self.keep = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in self.weights.items()}
        self.updates = updates  # step -> sparsity
        self.n_done = 0

    def step(self, micro_batches, clip):
        for batch in micro_batches:
            (self.model(**batch).loss / len(micro_batches)).backward()
        for name, weight in self.weights.items():
            weight.grad[~self.keep[name]] = 0
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for name, weight in self.weights.items():
            self.scores[name] -= weight.grad * weight.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.n_done += 1
        if self.n_done in self.updates:
            for name, weight in self.weights.items():
                self.prune(name, weight, round(self.updates[self.n_done] * weight.numel()))
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight[~self.keep[name]] = 0

    def prune(self, name, weight, n_removed):
        keep, scores = self.keep[name].flatten(), self.scores[name].flatten()
        left = [n for n in range(len(keep)) if keep[n]]
        left.sort(key=lambda n: float(scores[n]))
        for n in left[: n_removed - (len(keep) - len(left))]:
            keep[n] = False
        gone = ~keep.reshape(weight.shape)
        self.keep[name], self.scores[name][gone] = ~gone, 0
        for moment in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[weight][moment][gone] = 0


def test_weights_against_a_plain_loop():
    """Two micro-batches a step, clipping on, three updates on a cubic ramp."""
    data = batches(2)  # 16: 8 steps
    names = [site.name for site in inspect_model(zoo.build("bert")).weights]
    # between steps 1.6 and 6.4: after 3.2, 4.8 and 6.4; 1 - (1 - t)^3 at thirds
    plain = Plain(names, {3: 0.6 * 19 / 27, 5: 0.6 * 26 / 27, 6: 0.6})
    model = zoo.build("bert").eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    pruner = Pruner(model, optimizer, recipe(WEIGHTS), n_steps=8)
    rest = iter(range(0, 16, 2))
    n_alive = []

    def look():
        first = next(rest)
        plain.step(data[first : first + 2], clip=0.5)
        found, masks = movement_of(pruner), masks_of(model).weights
        for name in names:
            assert torch.allclose(found[f"weights:{name}"], plain.scores[name], rtol=1e-5, atol=1e-9), name
            assert torch.equal(masks.get(name, torch.ones_like(plain.keep[name])), plain.keep[name])
        n_alive.append(sum(int(keep.sum()) for keep in plain.keep.values()))

    train(model, optimizer, pruner, data, accumulate=2, clip=0.5, look=look)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(plain.model.named_parameters())[name]), name
    assert n_alive == sorted(n_alive, reverse=True) and len(set(n_alive)) == 4
    assert pruner.finish().to_dict()["sparsity"]["weights"] == pytest.approx(0.6, abs=1e-3)


def test_units_against_a_plain_loop():
    """Before anything leaves: each neuron's and head's own rows and columns, biases in, step by step."""
    model = zoo.build("bert").eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, recipe(*UNITS, name="one_shot", begin=1, end=1), n_steps=9)
    neurons, heads = torch.zeros(3, 48, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)

    def total(parameter, *index):
        return float((parameter.grad[index].double() * parameter.detach()[index].double()).sum())

    for batch in batches():
        model(**batch).loss.backward()
        for number, layer in enumerate(model.bert.encoder.layer):
            into, out = layer.intermediate.dense, layer.output.dense
            for n in range(48):
                neurons[number, n] -= total(into.weight, n) + total(into.bias, n) + total(out.weight, slice(None), n)
            for head in range(4):
                own = slice(8 * head, 8 * head + 8)
                for inner in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                    heads[number, head] -= total(inner.weight, own) + total(inner.bias, own)
                heads[number, head] -= total(layer.attention.output.dense.weight, slice(None), own)
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    found = movement_of(pruner)
    for number in range(3):
        of_neurons = found[f"ffn_neurons:bert.encoder.layer.{number}"]
        of_heads = found[f"attention_heads:bert.encoder.layer.{number}.attention.self"]
        assert torch.allclose(of_neurons.double(), neurons[number], rtol=1e-3, atol=1e-6)
        assert torch.allclose(of_heads.double(), heads[number], rtol=1e-3, atol=1e-6)
        assert of_neurons.abs().max() > 1e-3 and of_heads.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_units_of_other_layouts_are_sums_over_what_leaves_with_them(name):
    """Grouped queries and fused Conv1D: a unit's movement is that of all entries which masking it alone would zero."""
    model = zoo.build(name).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, recipe(*UNITS, name="one_shot", begin=1, end=1), n_steps=3)
    ids = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    products = {name: (p.grad * p.detach()).double() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    pruner.step()
    found = movement_of(pruner)
    for site in inspect_model(model):
        if site.target == "layers":
            continue
        for unit in range(site.n_units):
            of_unit = 0.0
            for piece in site.slices:
                if piece.name in products:
                    of_unit += float(
                        products[piece.name].index_select(piece.dim, piece.index(torch.tensor([unit]))).sum()
                    )
            assert float(found[site.key][unit]) == pytest.approx(-of_unit, rel=1e-3, abs=1e-6)


def test_units_leave_by_their_movement_and_are_forgotten():
    model = zoo.build("bert").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, optimizer, recipe(*UNITS), n_steps=8)
    seen = {"masks": masks_of(model), "movement": {}}

    def look():
        masks = masks_of(model)
        assert masks & seen["masks"] == masks, "what left stays out"
        for key, movement in movement_of(pruner).items():
            if key in masks.units:
                assert not movement[~masks.units[key]].any()
                assert movement[masks.units[key]].all()
        seen["masks"] = masks

    train(model, optimizer, pruner, batches(), clip=1.0, look=look)
    report = pruner.finish().to_dict()
    assert (report["sparsity"]["ffn_neurons"], report["sparsity"]["attention_heads"]) == (0.5, 0.25)
    assert sum(layer.intermediate.dense.out_features for layer in model.bert.encoder.layer) == 72


def test_a_soft_threshold_decides_in_training():
    model = zoo.build("bert").eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    step = {"target": "weights", "threshold": {"rule": "absolute", "value": 0.55}, "criterion": "soft_movement"}
    pruner = Pruner(model, optimizer, recipe(step, name="one_shot", begin=0.5), n_steps=8)
    names = [site.name for site in inspect_model(model).weights]
    plain = Plain(names, {})
    data = batches()[:4]

    def look():
        plain.step([data[plain.n_done]], clip=0.5)
        assert bool(masks_of(model)) == (plain.n_done == 4)

    train(model, optimizer, pruner, data, clip=0.5, look=look)
    shares = set()
    for name in names:
        scores = plain.scores[name].double()
        soft = torch.sigmoid(scores / (scores.abs().sum() / (scores != 0).sum()))
        clear = (soft - 0.55).abs() > 1e-6
        assert torch.equal(masks_of(model).weights[name][clear], (soft >= 0.55)[clear]), name
        shares.add(round(float((soft >= 0.55).double().mean()), 3))
    assert len(shares) > 3 and min(shares) > 0 and max(shares) < 1, "each matrix its own share"


@pytest.mark.parametrize("stop", [2, 7, 14])
def test_resuming_gives_the_weights_of_the_uninterrupted_run(tmp_path, stop):
    """16 steps; the schedule runs from 3 to 13: a stop before, inside and after it."""
    steps = recipe(*UNITS, WEIGHTS)
    whole = trainer(tmp_path / "whole", recipe=steps, save_strategy="steps", save_steps=stop)
    whole.train()
    rest = trainer(tmp_path / "rest", recipe=steps)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert masks_of(rest.model) == masks_of(whole.model)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], tensor), name
    reached = whole.pruning_report.to_dict()["sparsity"]
    assert reached["ffn_neurons"] == 0.5 and reached["weights"] == pytest.approx(0.6, abs=1e-3)


def test_a_state_holds_the_movement_bit_for_bit():
    def made():
        model = zoo.build("bert").eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, Pruner(model, optimizer, recipe(WEIGHTS, *UNITS), n_steps=8)

    model, optimizer, pruner = made()
    train(model, optimizer, pruner, batches()[:4])
    state = pruner.state_dict()
    saved = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    train(model, optimizer, pruner, batches()[4:5])
    assert all(torch.equal(state["tensors"][name], tensor) for name, tensor in saved.items()), "a copy, not a view"
    again, _, its_pruner = made()
    its_pruner.load_state_dict(state)
    found = movement_of(its_pruner)
    assert found and all(torch.equal(tensor, saved[f"movement|{key}"]) for key, tensor in found.items())
    assert masks_of(again)


def test_a_state_of_another_model_is_refused():
    def made(n_layers):
        model = zoo.build("bert", num_hidden_layers=n_layers)
        return Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe(*UNITS), n_steps=8)

    with pytest.raises(CheckpointError, match=r"other movement .* is \(4,\) there and None here"):
        made(2).load_state_dict(made(3).state_dict())


def test_a_callback_prunes_as_the_trainer_does(tmp_path):
    steps = recipe(*UNITS, WEIGHTS)
    run = trainer(tmp_path / "ours", recipe=steps, gradient_accumulation_steps=2, max_grad_norm=0.1)
    run.train()
    callback = hf_prune.PruningCallback(steps)
    stock = trainer(
        tmp_path / "callback",
        recipe=None,
        kind=Trainer,
        callbacks=[callback],
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
    )
    stock.train()
    assert all(
        torch.equal(a, b)
        for a, b in zip(run.model.state_dict().values(), stock.model.state_dict().values(), strict=True)
    )
    assert callback.pruning_report.to_dict()["sparsity"] == run.pruning_report.to_dict()["sparsity"]


class Clipped(TrainerCallback):
    """Adds up what a plain loop would, from the gradients that Trainer's optimizer gets."""

    def __init__(self):
        self.sums = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if name.endswith("dense.weight") and "encoder" in name:
                self.sums.setdefault(name, torch.zeros(parameter.shape))
                self.sums[name] -= parameter.grad.float() * parameter.detach().float()


@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 2, "max_grad_norm": 0.01}, {"bf16": True}, {"optim": "adafactor"}],
    ids=str,
)
def test_the_trainers_own_gradients_are_what_is_gathered(tmp_path, options):
    clipped = Clipped()
    run = trainer(
        tmp_path,
        recipe=recipe(WEIGHTS, name="one_shot", begin=1, end=1),
        callbacks=[clipped],
        save_strategy="steps",
        save_steps=4,
        **options,
    )
    seen = {}

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if run.pruner is not None and state.global_step == 4:
                seen.update(copy.deepcopy(clipped.sums))
                seen["found"] = movement_of(run.pruner)

    run.add_callback(Look())
    run.train()
    found = seen.pop("found")
    assert len(seen) == 9
    assert all(torch.allclose(found[f"weights:{name}"], sums, rtol=1e-5, atol=1e-9) for name, sums in seen.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_in_float32_whatever_the_model_is_in(dtype):
    model = zoo.build("bert", dtype).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = Pruner(model, optimizer, recipe(WEIGHTS, name="one_shot", begin=1, end=1), n_steps=9)
    weight, total = model.bert.encoder.layer[0].output.dense.weight, torch.zeros(32, 48)
    for batch in batches()[:3]:
        model(**batch).loss.backward()
        total -= weight.grad.float() * weight.detach().float()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    found = movement_of(pruner)["weights:bert.encoder.layer.0.output.dense.weight"]
    assert found.dtype == torch.float32 and torch.allclose(found, total, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_the_loss_scale_has_no_part_in_it_and_overflowed_steps_count_for_nothing(fused, unscale):
    model = zoo.build("bert").eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pruner = Pruner(model, optimizer, recipe(WEIGHTS, name="one_shot", begin=1, end=1), n_steps=9)
    name = "bert.encoder.layer.0.output.dense.weight"
    weight, total = model.get_parameter(name), torch.zeros(32, 48)
    for n, batch in enumerate(batches()[:3]):
        scale = scaler.get_scale()
        scaler.scale(model(**batch).loss).backward()
        if n == 1:
            model.bert.encoder.layer[1].output.dense.weight.grad[0, 0] = math.inf
        else:
            total -= weight.grad / scale * weight.detach()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        optimizer.zero_grad()
    found = movement_of(pruner)
    assert torch.allclose(found[f"weights:{name}"], total, rtol=1e-5, atol=1e-9)
    assert all(torch.isfinite(sums).all() for sums in found.values())


def test_accelerate_gathers_once_a_step_that_the_optimizer_took():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = zoo.build("bert").eval()
    plain = Plain([site.name for site in inspect_model(model).weights], {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model, optimizer, data = accelerator.prepare(model, optimizer, DataLoader(Tokens(), batch_size=4))
    pruner = Pruner(model, optimizer, recipe(WEIGHTS, name="one_shot", begin=1, end=1), n_steps=9)
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
    for n in range(0, 8, 2):
        plain.step(batches()[n : n + 2], clip=math.inf)
    found = movement_of(pruner)
    assert all(torch.allclose(found[f"weights:{name}"], total) for name, total in plain.scores.items())


# what can't be


def test_what_is_not_trained_is_refused_before_the_first_step():
    model = zoo.build("bert")
    model.bert.encoder.layer[1].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name = "bert.encoder.layer.1.attention.self.query.weight"
    for parameters in (model.parameters(), trained):
        with pytest.raises(RecipeError, match=f"{name}: its criterion scores how training moves it.*exclude"):
            Pruner(model, torch.optim.SGD(parameters, lr=0.1), recipe(WEIGHTS), n_steps=8)
    with pytest.raises(RecipeError, match=r"bert\.encoder\.layer\.1: its criterion"):
        Pruner(model, torch.optim.SGD(trained, lr=0.1), recipe(UNITS[0]), n_steps=8)
    Pruner(model, torch.optim.SGD(trained, lr=0.1), recipe(WEIGHTS | {"exclude": ["*.layer.1.*"]}), n_steps=8)


def test_an_optimizer_that_never_steps_is_an_error():
    model = zoo.build("bert")
    used, handed = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    pruner = Pruner(model, handed, recipe(WEIGHTS), n_steps=8)
    with pytest.raises(CalibrationError, match="hand Pruner the optimizer that trains the model"):
        train(model, used, pruner, batches())


def test_after_the_end_nothing_is_gathered_and_without_such_a_criterion_nothing_ever():
    model = zoo.build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, recipe(WEIGHTS), n_steps=8)
    train(model, optimizer, pruner, batches())
    assert optimizer._optimizer_step_pre_hooks
    pruner.finish()
    assert not optimizer._optimizer_step_pre_hooks
    other = Pruner(model, optimizer, recipe({"target": "weights", "sparsity": 0.7}), n_steps=8)
    assert not optimizer._optimizer_step_pre_hooks and not movement_of(other)
