"""Less calibration data than the recipe asks for is said, on every way in; none at all is an error."""

import copy
import json

import pytest
import torch

import hf_prune
from hf_prune.calibration.batches import first_samples, shortfall, take
from hf_prune.errors import CalibrationError
from tests import zoo
from tests.job import inputs
from tests.training.data import Tokens, trainer


SAMPLES = "the calibration data ended after {} samples, of {} that calibration.samples asks for"
LENGTH = "the longest calibration sample has {} tokens, of {} that calibration.length asks for"
STEP = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "activation"}


def batches(n=3, size=2, length=8):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 99, (size, length), generator=generator)} for _ in range(n)]


def test_what_is_missing_is_counted_without_padding():
    padded = batches()
    for batch in padded:
        batch["attention_mask"] = (torch.arange(8) < torch.tensor([[3], [5]])).long()
    assert shortfall(padded, 6, 5) == []
    assert shortfall(padded, 7, 6) == [SAMPLES.format(6, 7), LENGTH.format(5, 6)]
    assert shortfall(padded, None, None) == []
    assert shortfall([{"pixel_values": torch.zeros(2, 3, 8, 8)}], 2, 512) == []  # pictures have no tokens


def noted(recipe, calibration):
    plan = hf_prune.make_plan(zoo.build("llama"), {"version": 1, **recipe}, calibration=calibration)
    return [note for note in plan.notes if "calibration" in note]


def test_the_plan_says_it_where_data_are_looked_at_and_numbers_were_asked_for():
    asked = {"calibration": {"samples": 7, "length": 9}}
    both = [SAMPLES.format(6, 7), LENGTH.format(8, 9)]
    assert noted({"prune": [STEP], **asked}, batches()) == both
    repaired = {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "l2", "compensation": "least_squares"}
    assert [note for note in noted({"prune": [repaired], **asked}, batches()) if "asks for" in note] == both
    assert noted({"prune": [STEP]}, batches()) == []  # the defaults are nobody's wish
    assert noted({"prune": [STEP | {"criterion": "l2"}], **asked}, batches()) == []
    assert noted({"prune": [STEP], "calibration": {"samples": 6, "length": 8}}, batches()) == []


def test_prune_():
    model = zoo.build("llama")
    recipe = {"version": 1, "prune": [STEP], "calibration": {"samples": 64}}
    report = hf_prune.prune_(copy.deepcopy(model), recipe, calibration=batches())
    assert SAMPLES.format(6, 64) in report.content["notes"]
    assert SAMPLES.format(6, 64) in " ".join(str(report).split())
    for nothing in ([], None):
        with pytest.raises(CalibrationError, match="pass `calibration`"):
            hf_prune.prune_(model, recipe, calibration=nothing)


def test_trainer(tmp_path):
    recipe = {
        "version": 1,
        "prune": [STEP],
        "schedule": {"begin": 0.2, "end": 0.6, "updates": 2},
        "calibration": {"samples": 64, "length": 16, "batch_size": 4},
    }
    run = trainer(tmp_path, recipe, max_steps=4)
    run.train()  # on 32 samples of 10 tokens
    assert SAMPLES.format(32, 64) in run.pruning_report.content["notes"]
    assert LENGTH.format(10, 16) in run.pruning_report.content["notes"]
    few = trainer(tmp_path, recipe, max_steps=4, calibration_dataset=Tokens(5))
    few.train()
    assert SAMPLES.format(5, 64) in few.pruning_report.content["notes"]
    none = trainer(tmp_path, recipe, max_steps=4, calibration_dataset=Tokens(0))
    with pytest.raises(CalibrationError, match="ends after 0 samples; at least one sample is needed"):
        none.train()


@pytest.mark.parametrize("training", [inputs.TRAINING, None], ids=["training", "one shot"])
def test_run(tmp_path, training):
    from rich.console import Console

    from hf_prune.job.progress import Stages
    from hf_prune.job.run import run

    inputs.text_model(tmp_path / "model")
    inputs.texts(tmp_path / "data.csv")  # 60 rows of 8 words, of which 12 are held out
    path = inputs.write_recipe(
        tmp_path / "recipe.yaml", training=training, calibration={"samples": 100, "length": 16, "batch_size": 16}
    )
    report = run(hf_prune.Recipe.from_yaml(path), Stages(Console(quiet=True)))
    assert SAMPLES.format(48, 100) in report.content["notes"]
    assert LENGTH.format(8, 16) in report.content["notes"]
    saved = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert SAMPLES.format(48, 100) in saved["notes"]


def test_what_is_laid_out_in_another_way_than_by_sample_is_not_cut():
    plain = {"input_ids": torch.zeros(4, 8), "labels": torch.zeros(4), "use_cache": False}
    assert [len(first_samples(plain, 2)[name]) for name in ("input_ids", "labels")] == [2, 2]
    patches = plain | {"pixel_values": torch.zeros(24, 12), "image_grid_thw": torch.zeros(4, 3)}
    assert first_samples(patches, 2) == patches
    assert take([plain, plain], 6)[1]["input_ids"].shape == (2, 8)
    assert take([patches, patches], 6) == [patches, patches]
