"""Run by test_without_hf_prune.py in an environment that has PyTorch and Transformers only: `loads.py DIRECTORY`.

Every model under DIRECTORY was saved by another environment, beside the inputs and outputs that it had there. This file
imports nothing of ours.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


TOLERANCE = 1e-5  # of the largest output: float32, and releases of Transformers differ in the order of their sums


def outputs_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def assert_equal(what, found, expected):
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference <= TOLERANCE, f"{what} differs by {difference:.1e}"


def check(place):
    facts = json.loads((place / "facts.json").read_text())
    saved = load_file(place / "outputs.safetensors")
    expected, inputs = saved.pop("expected"), saved
    options = {"trust_remote_code": True} if facts["manifest"] else {}
    auto = getattr(transformers, facts["auto"])
    for folder in ("model", "sharded"):
        model = auto.from_pretrained(place / folder, **options)
        assert_equal(f"{place.name}: {folder}", outputs_of(model, inputs), expected)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
    half = auto.from_pretrained(place / "model", dtype=torch.bfloat16, **options)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    base = transformers.AutoModel.from_pretrained(place / "model", **options)
    assert_equal(f"{place.name}: base", outputs_of(base, inputs), outputs_of(model.base_model, inputs))
    model.save_pretrained(place / "again")
    assert_equal(
        f"{place.name}: again", outputs_of(auto.from_pretrained(place / "again", **options), inputs), expected
    )
    if facts["manifest"]:
        assert (place / "again" / "modeling_hf_prune.py").read_bytes() == (
            place / "model" / "modeling_hf_prune.py"
        ).read_bytes()
        try:
            auto.from_pretrained(place / "model")
        except (RuntimeError, ValueError):  # shapes that differ, or a request to trust the code
            pass
        else:
            raise AssertionError(f"{place.name} loads without its modelling file, so this proves nothing")


def check_pipeline(place):
    tokens = {"[UNK]": 0, **{f"w{number}": number for number in range(1, 99)}}
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    classify = transformers.pipeline(
        "text-classification", model=str(place / "model"), tokenizer=fast, trust_remote_code=True
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place / "model", trust_remote_code=True)
    logits = outputs_of(model, {"input_ids": torch.tensor([[5, 6, 7]])})
    said = classify("w5 w6 w7", top_k=None)
    assert_equal("pipeline", torch.tensor([max(each["score"] for each in said)]), logits.softmax(-1).max(-1).values)


if __name__ == "__main__":
    assert importlib.util.find_spec("hf_prune") is None, "hf_prune is installed here"
    places = sorted(path.parent for path in Path(sys.argv[1]).glob("*/facts.json"))
    for place in places:
        check(place)
    check_pipeline(Path(sys.argv[1]) / "bert-uneven")
    assert not [name for name in sys.modules if name.split(".")[0] == "hf_prune"]
    print(json.dumps({"transformers": transformers.__version__, "checked": [place.name for place in places]}))
