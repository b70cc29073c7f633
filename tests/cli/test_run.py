"""`hf-prune run` end to end on tiny models and real training: files, report, what loads again; interruptions."""

import csv
import json
import signal
import textwrap

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_prune.checkpoint import is_complete
from hf_prune.recipe import Recipe
from hf_prune.recipe.shipped import shipped_recipes
from tests.cli.conftest import snapshot
from tests.job import inputs
from tests.processes import python


FILES = {
    ".hf_prune_complete",
    "README.md",
    "config.json",
    "model.safetensors",
    "modeling_hf_prune.py",
    "pruning_report.json",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}


def report_in(directory):
    return json.loads((directory / "pruning_report.json").read_text(encoding="utf-8"))


def check_report(report, model, directory):
    """Against the model itself, counted here."""
    assert report["totals"]["pruned"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["totals"]["dense"]["parameters"] > report["totals"]["pruned"]["parameters"]
    measured = report["measured"]
    assert measured["bytes_on_disk"]["pruned"] == (directory / "model.safetensors").stat().st_size
    assert measured["bytes_on_disk"]["pruned"] < measured["bytes_on_disk"]["dense"]
    for side in ("dense", "pruned"):
        assert measured["latency_ms"][side].keys() == {"1", "8"}
        assert all(milliseconds > 0 for milliseconds in measured["latency_ms"][side].values())
    assert report["checkpoint"]["reload_difference"] == 0
    assert report["verification"]["max_difference"] <= report["verification"]["tolerance"]
    assert report["recipe"] == Recipe.from_yaml(directory / "recipe.yaml").to_dict()


def test_what_training_measured_is_in_the_report(cli, folder):
    schedule = {"begin": 0.1, "end": 0.5, "updates": 2, "shrink": "when_final"}
    inputs.write_recipe(folder / "recipe.yaml", schedule=schedule)
    done = cli("run", "recipe.yaml")
    assert done.code == 0, done.err
    measured = report_in(folder / "out")["measured"]
    assert measured["step_seconds"]["n_shrunk"] == 5  # of ten steps, five of the schedule
    assert measured.keys() == {"step_seconds", "metrics", "by_part", "latency_ms", "bytes_on_disk"}


@pytest.mark.parametrize("training", [inputs.TRAINING, None], ids=["training", "one shot"])
def test_text_classification(cli, folder, training):
    inputs.write_recipe(folder / "recipe.yaml", training=training)
    done = cli("run", "recipe.yaml")
    assert done.code == 0, done.err
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == FILES
    assert is_complete(out)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    report = report_in(out)
    check_report(report, model, out)
    assert model.config.id2label == {0: "sport", 1: "tech"}
    # the accuracy that the report says is that of the saved model on the rows that were held out
    kept = {site["name"]: site["n_kept"] for site in report["sites"] if site["target"] == "attention_heads"}
    assert sum(kept.values()) == 9  # of 12 a quarter left
    neurons = [site["n_kept"] for site in report["sites"] if site["target"] == "ffn_neurons"]
    assert sum(neurons) == 72  # half of 144
    assert report["measured"]["metrics"]["pruned"].keys() == {"accuracy", "loss"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    with (folder / "data.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer([row["text"] for row in rows], truncation=True, max_length=8, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    # what is printed: stages on stderr, the result on stdout, no escape codes
    assert "\x1b" not in done.out + done.err
    assert "from transformers import AutoModelForSequenceClassification" in done.out
    assert f'from_pretrained("{out}")' in done.out
    assert ("dense: training" in done.err) == (training is not None)


def test_evaluation_is_that_of_the_saved_model(cli, folder):
    """The reported accuracy, counted again from the files."""
    inputs.texts(folder / "test.csv", 30)
    (folder / "split").mkdir()
    (folder / "data.csv").rename(folder / "split" / "train.csv")
    (folder / "test.csv").rename(folder / "split" / "test.csv")
    done = cli("run", "recipe.yaml", "data.name_or_path=./split", "training.max_steps=30")
    assert done.code == 0, done.err
    model = AutoModelForSequenceClassification.from_pretrained(folder / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    with (folder / "split" / "test.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer([row["text"] for row in rows], truncation=True, max_length=8, padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1).tolist()
    right = [model.config.id2label[number] == row["label"] for number, row in zip(said, rows, strict=True)]
    measured = report_in(folder / "out")["measured"]
    assert measured["metrics"]["pruned"]["accuracy"] == pytest.approx(sum(right) / len(rows))
    for name in ("sport", "tech"):
        of_class = [is_right for is_right, row in zip(right, rows, strict=True) if row["label"] == name]
        assert measured["by_part"]["n_samples"][name] == len(of_class) == 15
        assert measured["by_part"]["pruned"][name] == pytest.approx(sum(of_class) / 15)
    assert measured["by_part"]["dense"].keys() == {"sport", "tech"} and "by class, accuracy where" in done.out
    assert "## Quality by class" in (folder / "out" / "README.md").read_text(encoding="utf-8")


def test_text_generation(cli, folder):
    inputs.text_model(folder / "llama", "llama")
    recipe = inputs.write_recipe(
        folder / "llama.yaml",
        model={"name_or_path": "./llama", "task": "text-generation"},
        prune=[{"target": "ffn_neurons", "sparsity": 0.5, "criterion": "activation", "uniform": True}],
    )
    done = cli("run", recipe)
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert model.config.intermediate_size == 24
    check_report(report_in(folder / "out"), model, folder / "out")
    measured = report_in(folder / "out")["measured"]
    assert measured["metrics"]["pruned"].keys() == {"perplexity", "loss"}
    # the column that a classifier would learn from says the domain
    parts = measured["by_part"]
    assert (parts["of"], parts["metric"]) == ("domain", "perplexity") and parts["n_samples"].keys() == {
        "sport",
        "tech",
    }
    for side in ("dense", "pruned"):
        between = sorted(parts[side].values())
        assert between[0] <= measured["metrics"][side]["perplexity"] * 1.01 <= between[1] * 1.02
    # a stock checkpoint: no manifest, no code
    assert not (folder / "out" / "modeling_hf_prune.py").exists()
    assert "import hf_prune" not in done.out
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    assert model.generate(**tokenizer("w1 w2", return_tensors="pt"), max_new_tokens=3).shape[1] >= 3


def test_image_classification(cli, folder):
    inputs.image_model(folder / "vit")
    inputs.images(folder / "pictures")
    recipe = inputs.write_recipe(
        folder / "vit.yaml",
        model={"name_or_path": "./vit", "task": "image-classification"},
        data={"name_or_path": "./pictures"},
    )
    done = cli("run", recipe)
    assert done.code == 0, done.err
    model = AutoModelForImageClassification.from_pretrained(folder / "out")
    check_report(report_in(folder / "out"), model, folder / "out")
    assert set(model.config.id2label.values()) == {"dark", "bright"}
    assert (folder / "out" / "preprocessor_config.json").exists()


def test_a_pruned_model_is_pruned_again(cli, folder):
    assert cli("run", "recipe.yaml", "training=null").code == 0
    again = cli("run", "recipe.yaml", "training=null", "model.name_or_path=./out", "output.dir=twice")
    assert again.code == 0, again.err
    first, second = report_in(folder / "out"), report_in(folder / "twice")
    assert second["totals"]["dense"]["parameters"] == first["totals"]["pruned"]["parameters"]
    AutoModelForSequenceClassification.from_pretrained(folder / "twice")


def test_the_same_run_again_replaces_what_it_wrote(cli, folder):
    assert cli("run", "recipe.yaml", "training.max_steps=2").code == 0
    first = snapshot(folder / "out")
    assert cli("run", "recipe.yaml", "training.max_steps=2", "seed=5").code == 0
    second = snapshot(folder / "out")
    assert second.keys() == first.keys() and second["model.safetensors"] != first["model.safetensors"]
    assert is_complete(folder / "out")


def test_the_models_own_classes_are_kept_in_their_order(cli, folder):
    """A head that was trained with tech as 0 goes on so, whatever the order of the data."""
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"id2label": {"0": "tech", "1": "sport"}, "label2id": {"tech": 0, "sport": 1}}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    assert cli("run", "recipe.yaml", "training=null").code == 0
    model = AutoModelForSequenceClassification.from_pretrained(folder / "out")
    assert model.config.id2label == {0: "tech", 1: "sport"}


# A look ahead


def test_plan_only_reads_no_weight(cli, folder):
    (folder / "model" / "model.safetensors").unlink()
    (folder / "data.csv").unlink()
    before = snapshot(folder)
    done = cli("run", "recipe.yaml", "--plan-only", "prune.1.scope=layer")
    assert done.code == 0, done.err
    assert snapshot(folder) == before
    assert "48" in done.out and "24" in done.out and "50.0%" in done.out  # half of each layer's neurons
    assert "loads with hf_prune" in done.out
    assert "equal sites of 1 to 47 of 48 ffn_neurons load without hf_prune" in done.out
    assert "which units" in done.out or "made up" in done.out
    assert done.err == ""


@pytest.mark.parametrize(
    "prune",
    [
        "prune=[{target: weights, pattern: '2:4'}]",
        "prune=[{target: ffn_neurons, threshold: {rule: absolute, value: 0.1}}]",
        "prune=[{target: ffn_neurons, sparsity: {macs: 0.1}}, {target: layers, remove: [1]}]",
        "prune=[{target: ffn_neurons, sparsity: 0.5, compensation: least_squares}]",
    ],
)
def test_plan_only_of_every_kind_of_step(cli, folder, prune):
    assert cli("run", "recipe.yaml", "--plan-only", prune).code == 0


@pytest.mark.parametrize("name", shipped_recipes())
def test_smoke_of_every_shipped_recipe(cli, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("run", name, "--smoke")
    assert done.code == 0, done.err
    assert done.out.startswith("the recipe works")
    recipe = Recipe.from_yaml(shipped_recipes()[name])
    trains = recipe.training is not None or recipe.model is None  # without a model: for a trainer
    assert ("training" in done.err) == ("trained" in done.out) == trains
    assert not list(tmp_path.iterdir())


# Nothing is lost


def start(folder, *arguments, program="", processes=1, timeout=180, **environment):
    """`hf-prune run recipe.yaml` as a process of its own, after `program` has run in it."""
    code = f"{textwrap.dedent(program)}\nfrom hf_prune.cli.main import main\nmain()\n"
    command = ("-c", code, "run", "recipe.yaml", *arguments)
    done = python(*command, folder=folder, n_processes=processes, timeout=timeout, **environment)
    return done.returncode, done.stdout, done.stderr


KILLED = """
    import os, signal
    import hf_prune.checkpoint.saving
    def killed(*args):
        os.kill(os.getpid(), signal.SIGKILL)
    hf_prune.checkpoint.saving._move_in = killed
"""
FULL = """
    import resource, signal, sys
    import hf_prune.job
    save = hf_prune.job.output.save
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    def full(*args):
        # the kernel refuses to make any file longer than this
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        return save(*args)
    sys.modules["hf_prune.job.run"].save = full
"""


def test_a_kill_while_saving_leaves_the_old_checkpoint(cli, folder):
    assert cli("run", "recipe.yaml", "training=null").code == 0
    before = snapshot(folder / "out")
    code, _, err = start(folder, "training=null", "seed=5", program=KILLED)
    assert code == -signal.SIGKILL, err
    assert snapshot(folder / "out") == before
    assert is_complete(folder / "out")
    # and the next run goes through
    assert cli("run", "recipe.yaml", "training=null", "seed=5").code == 0
    assert is_complete(folder / "out")


@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(2_000, id="tokenizer", marks=pytest.mark.slow),
        pytest.param(100_000, id="pruned model"),
        pytest.param(160_000, id="dense model", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_leaves_the_old_checkpoint(cli, folder, limit):
    assert cli("run", "recipe.yaml", "training=null").code == 0
    before = snapshot(folder / "out")
    code, out, err = start(folder, "training=null", "seed=5", program=FULL.format(limit=limit))
    assert code == 2, err
    assert "hf-prune: saving to" in err and "What was there is as it was" in err and "Traceback" not in err
    assert out == ""
    assert snapshot(folder / "out") == before
    assert not list(folder.glob(".*")), "a partial folder was left behind"


INTERRUPTED = """
    import os, signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests themselves run in the background
    from transformers import TrainerCallback
    import hf_prune.training.trainer as trainer
    init = trainer.PruningTrainer.__init__
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                os.kill(os.getpid(), signal.{signal})
    def with_stop(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.recipe is not None:
            self.add_callback(Stop())
    trainer.PruningTrainer.__init__ = with_stop
"""
SAVING = ("training.save_strategy=steps", "training.save_steps=3")


@pytest.mark.parametrize("sent", [pytest.param("SIGKILL", marks=pytest.mark.slow), "SIGINT"])
def test_an_interrupted_run_resumes_to_the_result_of_the_uninterrupted_one(cli, folder, sent):
    assert cli("run", "recipe.yaml", *SAVING, "output.dir=whole").code == 0
    code, _, err = start(folder, *SAVING, program=INTERRUPTED.format(signal=sent))
    assert code == (-signal.SIGKILL if sent == "SIGKILL" else 130), err
    assert "Traceback" not in err
    assert not is_complete(folder / "out")
    done = cli("run", "recipe.yaml", *SAVING, "training.resume_from_checkpoint=true")
    assert done.code == 0, done.err
    whole, resumed = (
        AutoModelForSequenceClassification.from_pretrained(folder / name).state_dict() for name in ("whole", "out")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_resuming_with_another_recipe_is_refused(cli, folder):
    start(folder, *SAVING, program=INTERRUPTED.format(signal="SIGKILL"))
    done = cli("run", "recipe.yaml", *SAVING, "training.resume_from_checkpoint=true", "prune.1.sparsity=0.3")
    assert done.code == 2
    assert "the checkpoint was made with another recipe" in done.err and "prune.1.sparsity" in done.err


@pytest.mark.slow
def test_two_processes_save_one_model(folder):
    options = ("training.average_tokens_across_devices=false",)
    code, out, err = start(folder, *options, processes=2, ACCELERATE_USE_CPU="true", timeout=400)
    assert code == 0, err
    assert out.count("load it with") == 1
    assert {path.name for path in (folder / "out").iterdir()} == FILES
    check_report(
        report_in(folder / "out"), AutoModelForSequenceClassification.from_pretrained(folder / "out"), folder / "out"
    )


@pytest.mark.slow
def test_a_mistake_is_told_once_by_two_processes(folder):
    code, out, err = start(folder, "data.label_column=kind", processes=2, ACCELERATE_USE_CPU="true", timeout=400)
    assert code != 0
    assert err.count("the data have no column 'kind'") == 1
    assert out == "" and not (folder / "out").exists()
