"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes by gloo, where deepspeed is installed."""

import json

import pytest

from tests.processes import attempt
from tests.training.test_fsdp import (
    JOB,
    OPTIONS,
    RECIPE,
    UPDATED,
    alike,
    require_equal,
    require_updated_alike,
    require_whole_checkpoint,
    trained,
)


pytest.importorskip("deepspeed", reason="deepspeed is not installed; docs/training.md says how")
pytestmark = pytest.mark.slow


def sharded(stage):
    zero = {"stage": stage}
    if stage == 3:
        # of these small matrices none would be partitioned otherwise
        zero |= {"stage3_param_persistence_threshold": 100, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "deepspeed": {
            "zero_optimization": zero,
            "gradient_clipping": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        },
        "use_cpu": False,
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_it_ends_where_one_process_does(tmp_path, stage):
    told, (first, second) = trained(tmp_path, "sharded", 2, sharded(stage))
    expected, (alone,) = trained(tmp_path, "alone", 1)
    require_equal(tmp_path, told, first, second, expected, alone)
    for step in (6, 12):
        folder = tmp_path / "sharded" / f"checkpoint-{step}"
        assert (folder / f"global_step{step}").is_dir(), "it was DeepSpeed that wrote it"
        require_whole_checkpoint(folder, alone_at=tmp_path / "alone" / f"checkpoint-{step}")
    _, resumed = trained(tmp_path, "from-6", 2, sharded(stage), resume=str(tmp_path / "sharded" / "checkpoint-6"))
    assert alike(resumed[0], first) and alike(resumed[1], first)


@pytest.mark.parametrize("how", UPDATED)
@pytest.mark.parametrize("stage", [2, 3])
def test_with_new_values_it_ends_where_whole_copies_do(tmp_path, stage, how):
    require_updated_alike(tmp_path, sharded(stage), UPDATED[how])


def test_what_needs_whole_parameters_is_refused_at_the_start(tmp_path):
    recipe = {**OPTIONS["recipe"], "schedule": {**RECIPE["schedule"], "shrink": "when_final"}}
    spec = {**OPTIONS, "recipe": recipe, "training": {**OPTIONS["training"], **sharded(3)}}
    done = attempt(JOB, tmp_path, "refused", json.dumps(spec), n_processes=2)
    assert done.returncode == 1 and "write shrink: at_end, or train under" in done.stderr, done.stderr[-4000:]
