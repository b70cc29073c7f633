"""Run by test_without_hf_prune.py where hf_prune can't be imported: `loads.py DIRECTORY`.

Every model under DIRECTORY was saved by another process, beside the inputs and outputs that it had there. This file
imports nothing of ours, and of what is no requirement of Transformers only what is installed.
"""

import copy
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


TOLERANCE = 1e-5  # of the largest output: float32, and releases of Transformers differ in the order of their sums


def outputs_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def assert_equal(what, found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference <= tolerance, f"{what} differs by {difference:.1e}"


def partly_from_disk(load, place):
    n_bytes = sum(each.numel() * each.element_size() for each in load().parameters())
    model = load(device_map="auto", max_memory={"cpu": n_bytes - 1}, offload_folder=place / "offload")
    assert any(each.is_meta for each in model.parameters()), "nothing was left on disk, so this proves nothing"
    return model


def with_adapters(load, place):
    """LoRA as it starts changes nothing; nor does merging it."""
    import peft

    config = peft.LoraConfig(target_modules="all-linear", r=2)
    peft.get_peft_model(load(), config).save_pretrained(place / "adapter")
    return peft.PeftModel.from_pretrained(load(), place / "adapter").merge_and_unload()


def quantised(load, place):
    from torchao.quantization import Int8WeightOnlyConfig

    model = load(quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()))
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(weight) for weight in weights} - {torch.nn.Parameter, torch.Tensor}, "nothing was quantised"
    return model


# way of loading or going on -> (the package that it takes, how); each gives a model that computes what the saved one does
WAYS = {
    "eager attention": (None, lambda load, place: load(attn_implementation="eager")),
    "sdpa attention": (None, lambda load, place: load(attn_implementation="sdpa")),
    "a deep copy": (None, lambda load, place: copy.deepcopy(load())),
    "pickled": (None, lambda load, place: pickle.loads(pickle.dumps(load()))),
    "compiled": (None, lambda load, place: torch.compile(load().eval(), backend="eager")),
    "device_map": ("accelerate", lambda load, place: load(device_map="auto")),
    "partly from disk": ("accelerate", partly_from_disk),
    "adapters": ("peft", with_adapters),
    "quantised": ("torchao", quantised),
}
# name of a result of generate -> its options
DECODING = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "static_beams": {"num_beams": 3, "cache_implementation": "static"},
}


def can_go(way, package, model):
    if way == "sdpa attention" and not model._supports_sdpa:
        return False
    if way == "quantised" and model.config.model_type == "gpt2":
        return False  # its layers are Conv1D, which torchao leaves as they are
    return package is None or importlib.util.find_spec(package) is not None


def generated(model, inputs, **options):
    text = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    return model.generate(**text, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)


def check(place):
    facts = json.loads((place / "facts.json").read_text())
    saved = load_file(place / "outputs.safetensors")
    expected, inputs = saved.pop("expected"), saved
    tokens = {beams: inputs.pop(f"generated_{beams}", None) for beams in (1, 3)}
    options = {"trust_remote_code": True} if facts["manifest"] else {}
    auto = getattr(transformers, facts["auto"])

    def load(**how):
        return auto.from_pretrained(place / "model", **options, **how)

    done = []
    for way, (package, how) in WAYS.items():
        if can_go(way, package, load()):
            tolerance = 0.05 if way == "quantised" else TOLERANCE
            assert_equal(f"{place.name}: {way}", outputs_of(how(load, place), inputs), expected, tolerance)
            done.append(way)
    for name, how in DECODING.items() if tokens[1] is not None else ():
        found = generated(load(), inputs, **how)
        assert torch.equal(found, tokens[how.get("num_beams", 1)]), f"{place.name}: generates otherwise, {name}"
        done.append(name)
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
    return done


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
    checked = {place.name: check(place) for place in places}
    check_pipeline(Path(sys.argv[1]) / "bert-uneven")
    assert not [name for name, module in sys.modules.items() if module and name.split(".")[0] == "hf_prune"]
    print(json.dumps({"transformers": transformers.__version__, "checked": checked}))
