"""Masked equals shrunk, and saved equals loaded, for the switches within a family that change its parts or their order."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    BertLMHeadModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    ViTForImageClassification,
)

import hf_prune
from hf_prune.apply.masks import masks_of, set_masks
from hf_prune.structure import inspect_model
from hf_prune.structure.inputs import example_inputs
from tests import zoo
from tests.apply.test_masked_is_shrunk import TARGETS, shrink_, some_masks
from tests.checkpoint.shrunk import assert_close, outputs


# (model of the zoo, changes of its config, targets that are refused)
VARIANTS = [
    ("deberta-v2", {"share_att_key": True}, ()),
    ("deberta-v2", {"conv_kernel_size": 3}, ()),
    ("deberta-v2", {"relative_attention": False}, ()),
    ("albert", {"inner_group_num": 2}, ()),
    ("albert", {"num_hidden_groups": 3}, ("layers",)),
    ("albert", {"num_hidden_layers": 4, "num_hidden_groups": 2}, ("layers",)),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ("layers",)),
    ("gpt2", {"reorder_and_upcast_attn": True, "n_inner": 40}, ()),
    ("falcon-heads", {"alibi": True}, ("attention_heads",)),
    ("falcon-old", {"parallel_attn": False, "bias": True}, ()),
    ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, ()),
    ("llama", {"attention_bias": True, "mlp_bias": True}, ()),
    ("llama", {"num_key_value_heads": 1}, ()),
    ("llama", {"num_key_value_heads": 4, "head_dim": 16}, ()),
    ("llama", {"tie_word_embeddings": True}, ()),
    ("opt", {"do_layer_norm_before": False}, ()),
    ("opt", {"enable_bias": False, "word_embed_proj_dim": 16}, ()),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}, ()),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}, ()),
    ("gemma2", {"sliding_window": 4}, ()),
    ("gemma3", {"sliding_window": 4}, ()),
    ("phi3", {"num_key_value_heads": 4}, ()),
    ("phi3", {"num_key_value_heads": 1}, ()),
    ("olmo2", {"num_key_value_heads": 4}, ()),
    ("olmo2", {"num_key_value_heads": 1}, ()),
    ("mistral", {"sliding_window": 4}, ()),
    ("vit", {"qkv_bias": False}, ()),
]

# (model of the zoo, class, changes of its config): other heads, single towers
CLASSES = [
    ("bert", AutoModelForTokenClassification, {}),
    ("roberta", AutoModelForMaskedLM, {}),
    ("distilbert", AutoModelForQuestionAnswering, {}),
    ("electra", AutoModelForMaskedLM, {}),
    ("deberta-v2", AutoModelForTokenClassification, {}),
    ("bert", BertLMHeadModel, {"is_decoder": True}),
    ("t5", AutoModelForSeq2SeqLM, {}),
    ("bart", AutoModelForSeq2SeqLM, {}),
    ("whisper", AutoModelForSpeechSeq2Seq, {}),
    ("vit", ViTForImageClassification, {}),
    ("clip", CLIPTextModelWithProjection, {}),
    ("clip", CLIPVisionModelWithProjection, {}),
]


def of_class(name, kind, changes=None, dtype=torch.float64):
    config = zoo.build(name, **(changes or {})).config
    if kind in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection):
        config = config.text_config if kind is CLIPTextModelWithProjection else config.vision_config
    torch.manual_seed(0)
    build = kind.from_config if hasattr(kind, "_model_mapping") else kind
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.to(dtype).eval()


def check(model, targets, directory):
    """Mask, shrink, save, load: the same outputs, and another than the whole model's."""
    masks = some_masks(model, targets)
    inputs = example_inputs(model)
    whole = outputs(model, inputs)
    set_masks(model, masks)
    masked = outputs(model, inputs)
    assert any((masked[key] - whole[key]).abs().max() > 1e-4 * whole[key].abs().max() for key in whole)
    shrink_(model)
    assert_close(masked, outputs(model, inputs))
    model.save_pretrained(directory)
    loaded = type(model).from_pretrained(directory, dtype=torch.float64)
    assert_close(masked, outputs(loaded, inputs))
    return loaded


EACH = [(target,) for target in TARGETS]


@pytest.mark.parametrize(
    "targets", [TARGETS, *(pytest.param(one, marks=pytest.mark.slow) for one in EACH)], ids="+".join
)
@pytest.mark.parametrize(("name", "changes", "refused"), VARIANTS, ids=lambda value: str(value)[:60])
def test_variants(name, changes, refused, targets, tmp_path):
    model = zoo.build(name, torch.float64, **changes)
    structure = inspect_model(model)
    assert {target for target in TARGETS if not structure.of(target)} == set(refused)
    if set(targets) <= set(refused):
        pytest.skip("refused; see test_what_is_refused_says_why_and_changes_nothing")
    check(model, targets, tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "target"),
    [
        ("bloom", {}, "attention_heads"),
        *((name, changes, one) for name, changes, targets in VARIANTS for one in targets),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_refused_says_why_and_changes_nothing(name, changes, target):
    model = zoo.build(name, **changes)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    reason = next(refusal.reason for refusal in inspect_model(model).refusals if refusal.kind == target)
    with pytest.raises(hf_prune.UnsupportedModelError) as caught:
        hf_prune.prune_(model, {"version": 1, "prune": [{"target": target, "sparsity": 0.5}]})
    assert reason in str(caught.value) and target in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config and not masks_of(model)


@pytest.mark.parametrize(
    "targets", [TARGETS, *(pytest.param(one, marks=pytest.mark.slow) for one in EACH)], ids="+".join
)
@pytest.mark.parametrize(("name", "kind", "changes"), CLASSES, ids=lambda value: getattr(value, "__name__", None))
def test_other_heads_and_single_towers(name, kind, changes, targets, tmp_path):
    check(of_class(name, kind, changes), targets, tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_decoders_with_cross_attention(kind, tmp_path):
    """BERT's is two attentions of one layout; GPT-2's takes queries by a layer of its own, so its heads are refused."""
    model = zoo.build(kind, torch.float64, add_cross_attention=True, is_decoder=True)
    if kind == "bert":
        model = of_class("bert", BertLMHeadModel, {"add_cross_attention": True, "is_decoder": True})
    structure = inspect_model(model)
    names = [site.name for site in structure.of("attention_heads")]
    crossed = [name for name in names if "cross" in name.lower()]
    if kind == "gpt2":
        assert not crossed and len(names) == 3
        assert any("q_attn" in refusal.reason for refusal in structure.refusals)
    else:
        assert len(crossed) == 3 and len(names) == 6
    masks = some_masks(model, TARGETS)
    states = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = {**example_inputs(model), "encoder_hidden_states": states, "use_cache": False}
    set_masks(model, masks)
    masked = outputs(model, inputs)
    shrink_(model)
    assert_close(masked, outputs(model, inputs))
    model.save_pretrained(tmp_path)
    assert_close(masked, outputs(type(model).from_pretrained(tmp_path, dtype=torch.float64), inputs))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt_neox"]
)
def test_generation_with_caches(name, cache, tmp_path):
    """Uneven key/value heads in each layer, and a layer less: caches take their sizes from what is there."""
    changes = {} if name in ("gpt2", "gpt_neox") else {"num_key_value_heads": 4}
    model = zoo.build(name, torch.float64, **changes)
    loaded = check(model, ("attention_heads", "layers"), tmp_path)
    ids = example_inputs(loaded, length=6)["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = loaded.generate(ids, use_cache=False, **options)
    assert torch.equal(loaded.generate(ids, cache_implementation=cache, **options), plain)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_generation_of_encoder_decoders(name, tmp_path):
    kind = AutoModelForSpeechSeq2Seq if name == "whisper" else AutoModelForSeq2SeqLM
    loaded = check(of_class(name, kind), TARGETS, tmp_path)
    inputs = {key: value for key, value in example_inputs(loaded).items() if "decoder" not in key}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = loaded.generate(**inputs, use_cache=False, **options)
    assert torch.equal(loaded.generate(**inputs, use_cache=True, **options), plain)
