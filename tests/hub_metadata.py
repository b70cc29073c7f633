"""The check that the Hub makes of a card's YAML header before it accepts a commit."""

from __future__ import annotations

import re
from typing import Any

import yaml


_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m afl-3.0 artistic-2.0
bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c
ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
RELATIONS = frozenset({"adapter", "merge", "quantized", "finetune"})
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")
PIPELINE_TAG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Returns `(errors, warnings)` for the text of a README.md."""
    header = re.match(r"^\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", content, flags=re.DOTALL | re.MULTILINE)
    if header is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(header.group(1))
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML Metadata Error: the metadata must be a mapping"], []
    errors = [*_names(metadata), *_model_index(metadata.get("model-index"))]
    return errors, []


def _names(metadata: dict[str, Any]) -> list[str]:
    errors = []
    for key, allowed, what in (
        ("license", LICENSES.__contains__, "one of the Hub's licence identifiers"),
        ("language", LANGUAGE.fullmatch, "ISO 639 codes"),
        ("base_model", REPO_ID.fullmatch, "a model id of the Hub"),
        ("datasets", REPO_ID.fullmatch, "dataset ids of the Hub"),
        ("tags", lambda tag: 0 < len(tag) <= 100, "short strings"),
        ("metrics", bool, "names of metrics"),
    ):
        value = metadata.get(key)
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            # YAML reads the Norwegian code `no` as False: the type is checked before the value.
            if not isinstance(item, str) or not allowed(item):
                errors.append(f'"{key}" with value {item!r} is not valid: it must be {what}')
    for key in ("tags", "datasets", "metrics"):
        if metadata.get(key) is not None and not isinstance(metadata[key], list):
            errors.append(f'"{key}" must be an array')
    if metadata.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(sorted(RELATIONS))}]')
    for key in ("library_name", "pipeline_tag"):
        value = metadata.get(key, "x")
        if not isinstance(value, str) or not value:
            errors.append(f'"{key}" must be a string')
    if not PIPELINE_TAG.fullmatch(str(metadata.get("pipeline_tag", "x"))):
        errors.append('"pipeline_tag" must be a task such as text-classification')
    if metadata.get("license") == "other" and not metadata.get("license_name"):
        errors.append('"license_name" is required when "license" is "other"')
    return errors


def _model_index(index: Any) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list) or not all(isinstance(model, dict) for model in index):
        return ['"model-index" must be an array of objects']
    errors = []
    for m, model in enumerate(index):
        if not isinstance(model.get("name"), str) or not model["name"]:
            errors.append(f'"model-index[{m}].name" is required')
        results = model.get("results")
        if not isinstance(results, list):  # Trainer writes an empty one where nothing was evaluated
            errors.append(f'"model-index[{m}].results" must be an array')
            continue
        for r, result in enumerate(results):
            where = f"model-index[{m}].results[{r}]"
            for part, needed in (("task", ("type",)), ("dataset", ("type", "name"))):
                for name in needed:
                    if not isinstance((result.get(part) or {}).get(name), str):
                        errors.append(f'"{where}.{part}.{name}" is required')
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{where}.metrics" must be a non-empty array')
                continue
            for k, metric in enumerate(metrics):
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    errors.append(f'"{where}.metrics[{k}]" needs a type and a value')
    return errors
