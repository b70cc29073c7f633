"""The loss with a teacher against loops written plainly, and trainings with one."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, Trainer, TrainerCallback

import hf_prune
from hf_prune.apply.masks import masks_of, set_masks
from hf_prune.errors import CheckpointError, RecipeError
from hf_prune.plan import KeepMasks
from hf_prune.recipe.schema import Distillation
from hf_prune.training.distillation import Distiller, soft_divergence, task_divisor
from tests import zoo
from tests.training.data import RECIPE, Tokens, trainer
from tests.training.test_trainer import weights_equal


DISTILLS = {**RECIPE, "distillation": {"temperature": 3, "weight": 0.7, "hidden_states": 0.2}}


def models(name, **changes):
    if name == "t5":
        student, teacher = (AutoModelForSeq2SeqLM.from_config(zoo.build("t5").config) for _ in range(2))
        for seed, model in enumerate((student, teacher)):
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return student.eval(), teacher.eval()
    return zoo.build(name, seed=0, **changes), zoo.build(name, seed=1, **changes)


def batch_of(name, n=3, seed=0):
    """Padded on the right; a causal or sequence-to-sequence model's labels have gaps."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (n, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "bert":
        return {**batch, "labels": torch.tensor([0, 1, 1])[:n]}
    labels = ids.clone() if name == "llama" else ids[:, :6].clone()
    labels[1, 4:] = -100
    labels[2, 0:2] = -100
    return {**batch, "labels": labels}


def plain_divergence(student, teacher, temperature):
    """One row after the other, with nothing but exp and log."""
    total = 0.0
    for ours, theirs in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p, q = ([math.exp(x / temperature) for x in row] for row in (theirs, ours))
        p, q = ([x / sum(row) for x in row] for row in (p, q))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total


def plain_terms(name, student, teacher, batch, temperature, kept):
    """Sums over labels: (divergence, hidden states), with Transformers' own hidden states."""
    with torch.no_grad():
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    labels = batch["labels"]
    rows, counts = [], [0] * len(labels)
    for b in range(len(labels)):
        if labels.dim() == 1:
            rows.append((b,))
            counts[b] = 1
            continue
        for t in range(labels.shape[1]):
            at = t - 1 if name == "llama" else t  # the position that predicts label t
            if at >= 0 and labels[b, t] != -100:
                rows.append((b, at))
                counts[b] += 1
    divergence = plain_divergence(
        torch.stack([ours.logits[row] for row in rows]), torch.stack([theirs.logits[row] for row in rows]), temperature
    )
    if name == "t5":
        stacks = [
            ("layers:encoder.block", "encoder_hidden_states", batch["attention_mask"]),
            ("layers:decoder.block", "decoder_hidden_states", labels != -100),
        ]
    else:
        stack = {"bert": "layers:bert.encoder.layer", "llama": "layers:model.layers"}[name]
        stacks = [(stack, "hidden_states", batch["attention_mask"])]
    total = 0.0
    for key, field, mask in stacks:
        states = list(zip(ours[field][1:], theirs[field][1:], strict=True))
        if name != "bert":
            states = states[:-1]  # the last one that Transformers gives is behind a norm
        layers = [n for n in kept.get(key, range(len(states))) if n < len(states)]
        of_stack = 0.0
        for n in layers:
            a, b = states[n]
            for sample in range(len(labels)):
                positions = [t for t in range(a.shape[1]) if mask[sample, t]]
                mean = sum(float((a[sample, t] - b[sample, t]).square().mean()) for t in positions) / len(positions)
                of_stack += counts[sample] * mean
        total += of_stack / len(layers) / len(stacks)
    return divergence, total, sum(counts)


def distilled(options, student, teacher, batch, masks=None, **named):
    distiller = Distiller(Distillation(**options), student, teacher)
    with distiller.watching():
        outputs = student(**batch)
    return distiller, distiller.loss(outputs.loss, outputs, batch, masks or KeepMasks(), **named), outputs


def without_last_layer(distiller):
    """Compare what Transformers shows too: of models that end in a norm all layers but the last."""
    for stack in distiller._stacks:
        difference = stack.difference

        def shorter(batch, shares, masks, stack=stack, difference=difference):
            n = stack.n_layers
            keep = masks.units.get(stack.key, torch.ones(n, dtype=torch.bool)).clone()
            keep[-1] = False
            return difference(batch, shares, KeepMasks({**masks.units, stack.key: keep}))

        stack.difference = shorter


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("dropped", [None, 1])
def test_the_loss_is_that_of_a_plain_loop(name, dropped):
    student, teacher = models(name)
    batch = batch_of(name)
    masks, kept = KeepMasks(), {}
    if dropped is not None:
        sites = hf_prune.inspect_model(student).of("layers")
        site = sites[0]
        keep = torch.ones(site.n_units, dtype=torch.bool)
        keep[dropped] = False
        masks, kept = KeepMasks({site.key: keep}), {site.key: [n for n in range(site.n_units) if n != dropped]}
        set_masks(student, masks)
    divergence, difference, n = plain_terms(name, student, teacher, batch, 3.0, kept)
    distiller = Distiller(Distillation(temperature=3.0, weight=0.7, hidden_states=0.2), student, teacher)
    if name != "bert":
        without_last_layer(distiller)
    with distiller.watching():
        outputs = student(**batch)
    for n_labels in (None, 5 * n):
        count = n if n_labels is None else n_labels
        task = outputs.loss * n / count
        loss = distiller.loss(task, outputs, batch, masks, n_labels=n_labels)
        expected = 0.3 * task.item() + (0.7 * divergence + 0.2 * difference) / count
        assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_the_last_layer_counts_too():
    student, teacher = models("llama", num_hidden_layers=1)
    seen = []
    for model in (student, teacher):
        model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    _, loss, outputs = distilled({"weight": 0.0, "hidden_states": 2.0}, student, teacher, batch)
    expected = float(outputs.loss) + 2 * float((seen[0] - seen[1]).square().mean())  # one sample, two labels of two
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    loss.backward()
    assert student.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
    assert not student.model.layers[0]._forward_hooks


def test_a_divergence_by_hand():
    """softmax(0, ln 3) = (1/4, 3/4) against (1/2, 1/2); at temperature 2 with logits twice as large the same, times 4."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3.0)]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(soft_divergence(student, teacher, 1.0)) == pytest.approx(expected, abs=1e-6)
    assert float(soft_divergence(student, 2 * teacher, 2.0)) == pytest.approx(4 * expected, abs=1e-6)


@pytest.mark.parametrize(("name", "takes"), [("llama", True), ("t5", False), ("bert", False)])
def test_what_the_task_loss_was_divided_by_is_told_from_it(name, takes):
    student, _ = models(name)
    batch = batch_of(name)
    outputs = student(**batch, **({"num_items_in_batch": torch.tensor(77)} if name != "t5" else {}))
    labels = batch["labels"]
    logits = outputs.logits
    if name == "llama":
        labels, logits = labels[:, 1:], logits[:, :-1]
    counted = labels != -100
    divisor = task_divisor(outputs.loss.detach(), logits[counted], labels[counted], torch.tensor(77))
    assert divisor == (77 if takes else counted.sum())


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(name):
    student, teacher = models(name)
    whole = batch_of("llama")
    n = int((whole["labels"][:, 1:] != -100).sum())
    options = {"temperature": 2.0, "weight": 0.5, "hidden_states": 0.3}
    gradients = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        student.zero_grad()
        for part in parts:
            batch = {key: value[part] for key, value in whole.items()}
            distiller = Distiller(Distillation(**options), student, teacher)
            with distiller.watching():
                outputs = student(**batch, num_items_in_batch=torch.tensor(n))
            distiller.loss(outputs.loss, outputs, batch, KeepMasks(), n_labels=torch.tensor(n)).backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Weights(TrainerCallback):
    """The weights after one optimizer step."""

    def __init__(self, step):
        self.step, self.weights = step, None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.weights = copy.deepcopy(model.state_dict())


def test_the_teacher_is_the_model_as_the_schedule_begins_and_its_metrics_are_logged(tmp_path):
    """16 steps, the schedule begins after the second."""
    weights = Weights(2)
    recipe = {**DISTILLS, "schedule": {**RECIPE["schedule"], "name": "constant"}}
    run = trainer(tmp_path, recipe=recipe, callbacks=[weights], eval_strategy="epoch")
    # the update at the begin comes after the copy: the copy has every neuron
    teachers = []
    stock = run._distill_from
    run._distill_from = lambda teacher, **named: (teachers.append(copy.deepcopy(teacher)), stock(teacher, **named))
    run.train()
    (teacher,) = teachers
    masked = [name for name, tensor in teacher.state_dict().items() if not torch.equal(tensor, weights.weights[name])]
    assert masked and all("weight" in name or "bias" in name for name in masked)
    for name in masked:
        ours, theirs = weights.weights[name], teacher.state_dict()[name]
        assert torch.equal(ours[ours != 0], theirs[ours != 0]), "they differ where the update masked, and nowhere else"
    logged = [entry for entry in run.state.log_history if "teacher_loss" in entry]
    assert len(logged) == 1 and logged[0]["step"] in (1, 2)
    reference = trainer(tmp_path / "reference", recipe=None, kind=Trainer, model=teacher).evaluate()
    assert logged[0]["teacher_loss"] == pytest.approx(reference["eval_loss"], abs=1e-6)
    assert run._distiller is None


def test_a_training_with_a_teacher_is_that_of_a_plain_loop(tmp_path):
    teacher = zoo.build("bert", seed=1)
    recipe = {
        "version": 1,
        "prune": [{"target": "layers", "remove": [1]}],
        "schedule": {"name": "one_shot", "begin": 0.5, "shrink": "never"},
        "distillation": {"temperature": 2, "weight": 0.6, "hidden_states": 0.1},
    }
    options = {
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "max_grad_norm": 0,
    }
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    run = trainer(tmp_path, recipe=recipe, model=zoo.build("bert", **config), **options)
    run.teacher_model = copy.deepcopy(teacher)
    batches = []
    step = run.training_step

    def training_step(model, inputs, *args, **kwargs):
        batches.append({name: value.clone() for name, value in inputs.items()})
        return step(model, inputs, *args, **kwargs)

    run.training_step = training_step
    run.train()
    student = zoo.build("bert", **config)
    layers = [0, 1, 2]
    for number, batch in enumerate(batches):
        if number == 2:
            layers = [0, 2]
            masks = KeepMasks({"layers:bert.encoder.layer": torch.tensor([True, False, True])})
            set_masks(student, masks)
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
        p, q = (torch.softmax(outputs.logits / 2, -1) for outputs in (theirs, ours))
        divergence = 4 * (p.detach() * (p.detach().log() - q.log())).sum() / len(batch["labels"])
        hidden = sum(
            (ours.hidden_states[n + 1] - theirs.hidden_states[n + 1].detach()).square().mean() for n in layers
        )
        (0.4 * ours.loss + 0.6 * divergence + 0.1 * hidden / len(layers)).backward()
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
    for name, tensor in student.state_dict().items():
        assert torch.allclose(tensor, run.model.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("stop", [1, 5, 13])
@pytest.mark.parametrize("given", [False, True], ids=["a copy", "a model"])
def test_resuming_with_a_teacher(tmp_path, stop, given):
    def run(directory, **options):
        made = trainer(directory, recipe=DISTILLS, **options)
        if given:
            made.teacher_model = zoo.build("bert", seed=1)
        return made

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=stop, eval_strategy="epoch")
    whole.train()
    rest = run(tmp_path / "rest", eval_strategy="epoch")
    checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
    assert (checkpoint / "pruning_teacher.safetensors").exists() == (not given and stop >= 2)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert weights_equal(rest.model, whole.model)
    assert masks_of(rest.model) == masks_of(whole.model)
    for each in (whole, rest):
        assert sum("teacher_loss" in entry for entry in each.state.log_history) == 1


def test_a_checkpoint_without_its_teacher_is_refused(tmp_path):
    trainer(tmp_path / "run", recipe=DISTILLS, save_strategy="steps", save_steps=8).train()
    (tmp_path / "run" / "checkpoint-16" / "pruning_teacher.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the teacher as it was"):
        trainer(tmp_path / "run", recipe=DISTILLS).train(resume_from_checkpoint=True)


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, REENTRANT, {"bf16": True}, {"label_smoothing_factor": 0.1}], ids=str
)
def test_it_goes_with_features_of_trainer(tmp_path, options):
    recipe = {**DISTILLS, "distillation": {"weight": 0.5, "hidden_states": 0.5}}
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {"optim": "sgd", "learning_rate": 0.05, **options}  # Adam makes much of the last digits
    run = trainer(tmp_path / "a", recipe=recipe, model=zoo.build("bert", **config), max_steps=6, **options)
    run.teacher_model = zoo.build("bert", seed=1, **config)
    run.train()
    if "gradient_checkpointing" in options:
        named = {name: options[name] for name in ("optim", "learning_rate")}
        plain = trainer(tmp_path / "b", recipe=recipe, model=zoo.build("bert", **config), max_steps=6, **named)
        plain.teacher_model = zoo.build("bert", seed=1, **config)
        plain.train()
        assert all(
            torch.allclose(a, b, atol=1e-6)
            for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True)
        )
    assert all(math.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)


def test_what_can_not_be_distilled_says_why(tmp_path):
    with pytest.raises(RecipeError, match="no section `distillation`"):
        hf_prune.PruningTrainer(model=zoo.build("bert"), teacher_model=zoo.build("bert"), recipe=RECIPE)
    model = zoo.build("bert")
    with pytest.raises(RecipeError, match="the model in training itself"):
        Distiller(Distillation(), model, model)
    with pytest.raises(RecipeError, match=r"layers .*3.* teacher .*2.*hidden_states: 0"):
        Distiller(Distillation(hidden_states=1.0), model, zoo.build("bert", num_hidden_layers=2))
    batch = batch_of("bert")
    with pytest.raises(RecipeError, match=r"logits are \(3, 3\), those of the model in training \(3, 2\)"):
        distilled({}, model, zoo.build("bert", num_labels=3), batch)
    regression = zoo.build("bert", num_labels=1), zoo.build("bert", seed=1, num_labels=1)
    with pytest.raises(RecipeError, match="labels that are no classes"):
        distilled({}, *regression, {**batch, "labels": batch["labels"].float()})
    with pytest.raises(RecipeError, match="only PruningTrainer and PruningMixin"):
        hf_prune.Pruner(model, torch.optim.SGD(model.parameters(), 0.1), DISTILLS, n_steps=4)
    stock = trainer(tmp_path, recipe=None, kind=Trainer, callbacks=[hf_prune.PruningCallback(DISTILLS)])
    with pytest.raises(RecipeError, match="only PruningTrainer and PruningMixin"):
        stock.train()


def test_evaluation_is_of_the_task_alone(tmp_path):
    run = trainer(tmp_path, recipe=DISTILLS, eval_strategy="steps", eval_steps=16)
    run.teacher_model = zoo.build("bert", seed=1)
    run.train()
    with torch.no_grad():
        test = Tokens(seed=1)
        batch = {name: torch.stack([test[n][name] for n in range(len(test))]) for name in test[0]}
        expected = float(run.model.eval()(**batch).loss)
    assert run.state.log_history[-2]["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_teacher_in_parts_is_refused(tmp_path):
    teacher = zoo.build("bert", seed=5)
    next(teacher.parameters()).ds_id = 0  # as DeepSpeed's ZeRO-3 marks what it has taken apart
    run = trainer(tmp_path, recipe=DISTILLS, teacher_model=teacher)
    with pytest.raises(RecipeError, match="load it before TrainingArguments are made"):
        run.train()
