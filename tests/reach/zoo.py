"""A tiny random model of every model type that Transformers' Auto classes know, with inputs, without a network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.zoo import is_before

from .corrections import AUTO, CONFIGS, FILLED, INPUTS, NORMALIZED
from .inputs import make_inputs
from .shrinking import shrunken


# Why types can't be built here. Configs are shrunken for Transformers 5.23; what an older one makes of some of them is no use.
REASONS: dict[str, str] = {
    model_type: reason
    for name in ("reasons", *(["reasons-before-5.23"] if is_before("5.23") else []))
    for model_type, reason in json.loads((Path(__file__).parent / f"{name}.json").read_text()).items()
}
# The class that shows most of a model comes first: one that generates, then one that has a loss.
HEADS = (
    "ImageTextToText", "MultimodalLM", "CausalLM", "SpeechSeq2Seq", "Seq2SeqLM", "MaskedLM", "SequenceClassification",
    "ImageClassification", "CTC", "RNNT", "TDT", "AudioClassification", "TokenClassification", "QuestionAnswering",
    "UniversalSegmentation", "InstanceSegmentation", "SemanticSegmentation", "ImageSegmentation", "ObjectDetection",
    "ZeroShotObjectDetection", "VideoClassification", "DepthEstimation", "TimeSeriesPrediction", "PreTraining",
)  # fmt: skip


class NotBuildable(Exception):
    """This model type can't be made here; the message says why."""


@dataclass
class Built:
    model: PreTrainedModel  # float32, in evaluation mode
    inputs: dict[str, Any]  # keyword arguments of its forward
    model_type: str


@cache
def _known() -> dict[str, tuple[str, ...]]:
    """Model type -> the Auto classes that know it."""
    known: dict[str, list[str]] = {}
    for name in dir(transformers):
        auto = getattr(transformers, name) if name.startswith("AutoModel") else None
        mapping = getattr(auto, "_model_mapping", None)
        for model_type in () if mapping is None else mapping._model_mapping:
            known.setdefault(model_type, []).append(name)
    return {model_type: tuple(names) for model_type, names in known.items()}


def model_types() -> list[str]:
    """Every model type of AutoModel and of the Auto classes with a head."""
    return sorted(_known())


def base_types() -> list[str]:
    """Those that AutoModel itself knows."""
    return sorted(modeling_auto.MODEL_MAPPING_NAMES)


def auto_class(model_type: str) -> type:
    """The Auto class that shows most of a model of this type."""
    if model_type in AUTO:
        return getattr(transformers, AUTO[model_type])
    known = _known()[model_type]
    heads = [name for head in HEADS if (name := f"AutoModelFor{head}") in known]
    return getattr(transformers, (heads or ["AutoModel"] if "AutoModel" in known else heads or list(known))[0])


def build(model_type: str, auto: type | None = None, seed: int = 0) -> Built:
    """A tiny model of this type with random weights, large enough that every part shows in its output, and inputs."""
    if model_type in REASONS:
        raise NotBuildable(f"{model_type}: {REASONS[model_type]}")
    config = shrunken(CONFIG_MAPPING[model_type](), CONFIGS.get(model_type, {}), {})
    config.architectures = config.architectures or []  # None where a type has several classes is iterated over
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chosen = auto or auto_class(model_type)
        model = chosen._from_config(config) if issubclass(chosen, PreTrainedModel) else chosen.from_config(config)
        model = model.float().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            for name, buffer in model.named_buffers():
                if name.endswith((".embed", ".embed_sum")) and not buffer.any():  # a codebook that training fills
                    buffer.add_(torch.randn(buffer.shape, generator=generator))
        inputs = make_inputs(model, INPUTS.get(model_type, {}), seed)
        if model_type in NORMALIZED:
            _normalize(model, inputs)
        if model_type in FILLED:
            _fill(model, inputs, generator)
    return Built(model, inputs, model_type)


def _normalize(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Gives batch norms the statistics of these inputs: with those of no training a signal fades in many layers."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(**inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def _fill(model: PreTrainedModel, inputs: dict[str, Any], generator: torch.Generator) -> None:
    """Puts the entries of codebooks among the vectors that these inputs give them, so that not one takes them all."""
    codebooks = [module for module in model.modules() if hasattr(module, "quantize") and hasattr(module, "embed")]

    def filled(codebook: Any, hidden: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(codebook.embed.shape, generator=generator)
        codebook.embed.copy_(hidden.mean(dim=0) + hidden.std(dim=0) * noise)
        return type(codebook).quantize(codebook, hidden)

    for codebook in codebooks:
        codebook.quantize = partial(filled, codebook)
    with torch.no_grad():
        model(**inputs)
    for codebook in codebooks:
        del codebook.quantize
