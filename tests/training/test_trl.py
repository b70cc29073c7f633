"""`PruningMixin` over TRL's SFTTrainer, which makes its own arguments, collator, loss and logs."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_prune import PruningMixin
from hf_prune.apply.masks import masks_of
from tests import zoo
from tests.training.test_trainer import Watch, weights_equal


trl = pytest.importorskip("trl", reason="in the extra `dev`")

RECIPE = {
    "version": 1,
    "prune": [
        {"target": "ffn_neurons", "sparsity": 0.5, "criterion": "taylor", "scope": "global"},
        {"target": "weights", "sparsity": 0.3},
    ],
    "schedule": {"name": "cubic", "begin": 0.1, "end": 0.6, "updates": 3},
    "calibration": {"samples": 8, "batch_size": 4},
}


class PruningSFTTrainer(PruningMixin, trl.SFTTrainer):
    pass


def sft(directory, kind=PruningSFTTrainer, options=None, **named):
    words = [f"w{number}" for number in range(90)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *words])}, unk_token="<unk>")
        ),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    drawn = torch.randint(0, 90, (32, 9), generator=torch.Generator().manual_seed(0)).tolist()
    text = [" ".join(words[number] for number in row[: 4 + row[0] % 6]) for row in drawn]
    defaults = dict(
        output_dir=str(directory),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-3,
        max_length=16,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=4,
        use_cpu=True,
        bf16=False,
        seed=3,
        dataloader_pin_memory=False,
    )
    return kind(
        model=zoo.build("llama"),
        args=trl.SFTConfig(**{**defaults, **(options or {})}),
        train_dataset=Dataset.from_dict({"text": text}),
        eval_dataset=Dataset.from_dict({"text": text[:8]}),
        processing_class=tokenizer,
        **named,
    )


def history(run):
    timed = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in run.state.log_history]


def test_without_a_recipe_it_is_sft_trainer_bit_for_bit(tmp_path):
    ours, stock = sft(tmp_path / "ours"), sft(tmp_path / "stock", kind=trl.SFTTrainer)
    for run in (ours, stock):
        run.train()
    assert weights_equal(ours.model, stock.model)
    assert history(ours) == history(stock)


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_it_prunes_on_schedule_and_logs_what_sft_trainer_logs(tmp_path, options):
    watch = Watch()
    run = sft(tmp_path / "run", options=options, recipe=RECIPE, callbacks=[watch])
    run.train()
    assert watch.n_masked > 0
    report = run.pruning_report.to_dict()
    assert report["sparsity"]["ffn_neurons"] == 0.5
    assert report["sparsity"]["weights"] == pytest.approx(0.3, abs=1e-3)
    assert report["verification"]["max_difference"] <= report["verification"]["tolerance"]
    assert run.evaluate()["eval_loss"] > 0
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert logged and all({"mean_token_accuracy", "entropy", "sparsity/weights"} <= entry.keys() for entry in logged)
    assert len([entry for entry in run.state.log_history if "pruning/loss_after" in entry]) == 3
    run.save_model(str(tmp_path / "saved"))
    assert weights_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), run.model)


def test_resuming_gives_the_weights_of_the_uninterrupted_run(tmp_path):
    whole = sft(tmp_path / "whole", recipe=RECIPE, options={"save_strategy": "steps", "save_steps": 7})
    whole.train()
    rest = sft(tmp_path / "rest", recipe=RECIPE)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    assert weights_equal(rest.model, whole.model)
    assert masks_of(rest.model) == masks_of(whole.model)
