"""Saving loses nothing: full disks, kills at any moment, older checkpoints in the same place."""

import json
import os
import signal
import textwrap

import pytest
import torch
from transformers import BertForSequenceClassification

from hf_prune.checkpoint import ARTIFACTS, MARKER, is_complete
from hf_prune.errors import CheckpointError
from tests.checkpoint.shrunk import shrunk
from tests.processes import python


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def add_one_(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def run(program, directory):
    return python("-c", textwrap.dedent(program), directory)


@pytest.fixture
def model():
    return shrunk("bert")[0]


def test_recipe_report_and_card_go_beside_the_weights(model, tmp_path):
    setattr(model, ARTIFACTS, {"recipe.yaml": "version: 1\n", "pruning_report.json": "{}", "README.md": "# Ünïcode\n"})
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == "# Ünïcode\n"
    assert is_complete(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("people edit cards")
    assert is_complete(tmp_path / "model")
    (tmp_path / "model" / "recipe.yaml").unlink()
    assert not is_complete(tmp_path / "model")


def test_a_stock_result_with_a_report_has_no_trace_in_its_config(tmp_path):
    model, verdict = shrunk("llama", targets=("ffn_neurons",), uneven=False)
    assert verdict.loads_with == "transformers"
    setattr(model, ARTIFACTS, {"recipe.yaml": "version: 1\n"})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"hf_prune", "auto_map"} & config.keys()
    assert not list(tmp_path.glob("*.py"))
    assert is_complete(tmp_path)


def test_what_else_the_directory_holds_stays(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "notes").is_dir()


@pytest.mark.parametrize(("first", "second"), [("5KB", "50GB"), ("50GB", "5KB"), ("5KB", "20KB")])
def test_weights_of_an_earlier_save_never_shadow_the_new_ones(model, tmp_path, first, second):
    model.save_pretrained(tmp_path, max_shard_size=first)
    add_one_(model)
    model.save_pretrained(tmp_path, max_shard_size=second)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    listed = json.loads((tmp_path / MARKER).read_text())["files"]
    assert {path.name for path in tmp_path.iterdir()} == {*listed, MARKER}


def test_a_variant_leaves_the_other_one_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    add_one_(model)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="5KB")
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*-of-*"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path, variant="fp16").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_pickled_weights_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="safetensors only"):
        model.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()


def test_a_file_in_the_place_of_the_directory(model, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_other_processes_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_mount_point_is_staged_inside(model, tmp_path, monkeypatch):
    """Files can't be renamed from one file system to another."""
    target = tmp_path / "model"
    target.mkdir()
    sources = set()
    rename = os.replace
    monkeypatch.setattr("os.path.ismount", lambda path: os.fspath(path) == str(target))
    monkeypatch.setattr("os.replace", lambda a, b: (sources.add(os.path.dirname(a)), rename(a, b)))
    model.save_pretrained(target)
    assert {os.path.dirname(source) for source in sources} == {str(target)}
    assert is_complete(target)
    assert not list(target.glob("*.partial"))


def test_the_current_directory_as_target(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model.save_pretrained(".")
    assert is_complete(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_full_disk_leaves_the_old_checkpoint(model, tmp_path):
    """The real thing as near as can be: the kernel refuses to make any file longer than 8 KB."""
    target = tmp_path / "model"
    model.save_pretrained(target)
    before = contents(target)
    done = run(
        """
        import resource, signal, sys
        import hf_prune
        from transformers import BertForSequenceClassification
        model = BertForSequenceClassification.from_pretrained(sys.argv[1])
        for parameter in model.parameters():
            parameter.data.add_(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            model.save_pretrained(sys.argv[1])
        except hf_prune.CheckpointError as error:
            print("refused:", error)
        """,
        target,
    )
    assert "refused: saving to" in done.stdout, done.stderr
    assert contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "a partial folder was left behind"


KILLED = """
    import os, signal, sys
    import hf_prune
    from transformers import BertForSequenceClassification
    model = BertForSequenceClassification.from_pretrained(sys.argv[1])
    for parameter in model.parameters():
        parameter.data.add_(1)
    def killed(*args):
        os.kill(os.getpid(), signal.SIGKILL)
    {when}
    model.save_pretrained(sys.argv[1])
"""


def test_a_kill_before_the_renames_leaves_the_old_checkpoint(model, tmp_path):
    target = tmp_path / "model"
    model.save_pretrained(target)
    before = contents(target)
    done = run(KILLED.format(when="os.fsync = killed"), target)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(target) == before
    assert is_complete(target)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_kill_between_the_renames_can_be_told(model, tmp_path, after):
    target = tmp_path / "model"
    model.save_pretrained(target)
    when = f"""calls, rename = [], os.replace
    def replace(*args):
        calls.append(args)
        killed() if len(calls) > {after} else rename(*args)
    os.replace = replace"""
    done = run(KILLED.format(when=when), target)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not is_complete(target)
    # what is there still loads: all the old, or the new weights with a config that says the same sizes
    BertForSequenceClassification.from_pretrained(target)


@pytest.mark.parametrize(
    "marker", ["", "[]", '{"files": 3}', '{"files": {"../model/config.json": 1}}', '{"files": {"nowhere": 1}}']
)
def test_a_bad_marker_is_incomplete(model, tmp_path, marker):
    model.save_pretrained(tmp_path)
    (tmp_path / MARKER).write_text(marker)
    assert not is_complete(tmp_path)
