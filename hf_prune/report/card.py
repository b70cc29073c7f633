"""The model card of a pruned checkpoint: the report, told to whoever finds the model on the Hub.

Everything in it comes from the report, the recipe or the metadata of the model it was made from. A number that nobody
measured is not there, and the limits say so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_prune.remote import HUB_ID
from hf_prune.report import sections
from hf_prune.report.picture import FILE_NAME
from hf_prune.report.table import (
    dense_words,
    difference,
    hardware_words,
    is_smaller,
    no_change,
    part_rows,
    relative_change,
    sample_shape,
    shown,
    site_rows,
)
from hf_prune.report.verdict import verdict


_TEMPLATE = "card.md.j2"
_NO_REPOSITORY = "path/or/repo"  # in the examples, until it is known where the model goes
_MOST_PARTS = 20  # classes or domains in the card; all are in the report
_TITLES = {"macs": "MACs", "bytes": "bytes in memory"}
_UNITS = {
    "layers": "layer",
    "layers.attention": "attention part",
    "layers.feed_forward": "feed-forward part",
    "attention_heads": "attention head",
    "ffn_neurons": "feed-forward neuron",
    "experts": "expert",
}


def render_card(report: dict[str, Any], recipe_yaml: str, *, base_model: str | None, metadata: dict[str, Any]) -> str:
    """Writes the card's text.

    Args:
        report: `PruningReport.to_dict()`; keys that are missing leave their part of the card out.
        recipe_yaml: the recipe as it was run.
        base_model: the Hub id of the model that was pruned. A local path is named by its last part, and kept out of
            the metadata, where the Hub accepts ids only.
        metadata: the card's header fields that are inherited (`license`, `language`, `datasets`, `pipeline_tag`, …)
            and three that are used here: `repo_id` for the examples, `model_name` for the title, and `dataset`, a
            mapping with `type` and `name` (`config`, `split`, `revision`) that says where the metrics come from.

    Returns:
        The text of README.md, header included.

    Raises:
        ValueError: if a header field is one that `huggingface_hub` can't write.
    """
    fields = dict(metadata)
    repo_id = fields.pop("repo_id", None)
    dataset = fields.pop("dataset", None)
    name = fields.pop("model_name", None) or _name(repo_id or base_model)
    hub_id = base_model if base_model and HUB_ID.fullmatch(base_model) and not Path(base_model).exists() else None
    checkpoint = report.get("checkpoint") or {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(_TEMPLATE).render(
        card_data=_card_data(report, fields, name, hub_id, dataset).to_yaml(),
        title=name if repo_id or name.endswith("pruned") else f"{name}, pruned",
        base_model=f"`{_name(base_model) if hub_id is None else hub_id}`" if base_model else None,
        description=(report.get("recipe") or {}).get("description"),
        made=_made(report),
        targets=_targets(report),
        has_dropped_layers=any(target == "layers" and left for target, left in _removed(report).items()),
        sites=[(target, name, f"{of:,}", f"{kept:,}", left) for target, name, of, kept, left in site_rows(report)],
        tables=_tables(report),
        plain=checkpoint.get("loads_with", "transformers") == "transformers",
        why=_sentence(checkpoint.get("why")),
        verdict=[_sentence(line) for line in verdict(report).values()],
        auto_class=checkpoint.get("class") or "AutoModel",
        repo_id=repo_id or _NO_REPOSITORY,
        verification=_verification(report),
        recipe_yaml=recipe_yaml.strip(),
        fence="`" * (1 + max([2, *(len(run) for run in re.findall("`+", recipe_yaml))])),
        limits=_limits(report),
        versions=", ".join(f"{package} {version}" for package, version in (report.get("versions") or {}).items()),
    )
    return sections.mark(str(ModelCard(re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")))


def for_repository(card: str, repo_id: str) -> str:
    """The card with examples that load from `repo_id`, where they named no repository yet."""
    named = f'from_pretrained("{repo_id}"'
    return sections.change(card, lambda text: text.replace(f'from_pretrained("{_NO_REPOSITORY}"', named))


def with_picture(card: str) -> str:
    """The card with the picture that lies beside it, behind what left."""
    text = f"## Picture\n\n![The share kept of each target, layer by layer]({FILE_NAME})\n"
    return sections.add(card, "picture", text, after="what-left")


def _card_data(
    report: dict[str, Any], fields: dict[str, Any], name: str, hub_id: str | None, dataset: Mapping[str, Any] | None
) -> ModelCardData:
    tags = fields.pop("tags", None) or []
    inherited = {key: value for key, value in fields.items() if key not in ("base_model", "base_model_relation")}
    # Of the Hub's four relations (adapter, merge, quantized, finetune) a pruned model is the last: all its own weights.
    base = {"base_model": hub_id, "base_model_relation": "finetune"} if hub_id else {}
    results = _eval_results(report, fields, dataset)
    return ModelCardData(
        **{"library_name": "transformers", **inherited, **base},
        tags=[*dict.fromkeys(["hf_prune", "pruned", *([tags] if isinstance(tags, str) else tags)])],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _eval_results(
    report: dict[str, Any], fields: dict[str, Any], dataset: Mapping[str, Any] | None
) -> list[EvalResult]:
    """The metrics for the header, the pruned model's and beside them the dense one's; none without a task and a dataset, which the Hub insists on."""
    task = fields.get("pipeline_tag") or ((report.get("recipe") or {}).get("model") or {}).get("task")
    if not task or not dataset or not dataset.get("type"):
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset["type"],
            dataset_name=dataset.get("name") or dataset["type"],
            dataset_config=dataset.get("config"),
            dataset_split=dataset.get("split"),
            dataset_revision=dataset.get("revision"),
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for metric, dense, pruned in _metrics(report)
        for name, value in ((metric, pruned), (f"{metric} of the dense model", dense))
        if pruned is not None and value is not None
    ]


def _metrics(report: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """`(name, dense, pruned)` of all that was measured of the whole data, except latency and size."""
    rows = []
    for key, value in (report.get("measured") or {}).items():
        if key in ("latency_ms", "bytes_on_disk", "by_part") or not isinstance(value, Mapping):
            continue
        dense, pruned = value.get("dense"), value.get("pruned")
        if not isinstance(dense, Mapping) and not isinstance(pruned, Mapping):
            dense, pruned = {key: dense}, {key: pruned}
        rows += _pairs(dense, pruned)
    return rows


def _pairs(dense: Any, pruned: Any) -> list[tuple[str, float | None, float | None]]:
    dense, pruned = dense or {}, pruned or {}
    rows = [(str(name), _number(dense.get(name)), _number(pruned.get(name))) for name in {**dense, **pruned}]
    return [row for row in rows if row[1:] != (None, None)]


def _removed(report: dict[str, Any]) -> dict[str, int]:
    """Units that left, by target; of weights the entries set to zero."""
    removed: dict[str, int] = {}
    for site in report.get("sites") or []:
        removed[site["target"]] = removed.get(site["target"], 0) + site["n_units"] - site["n_kept"]
    if report.get("weights"):
        removed["weights"] = sum(weight["n_zero"] for weight in report["weights"])
    return removed


def _made(report: dict[str, Any]) -> str:
    """What was done, in one phrase."""
    removed = {target: count for target, count in _removed(report).items() if count}
    parts = [_several(removed[target], word) for target, word in _UNITS.items() if target in removed]
    said = [f"without {', '.join(parts)}"] if parts else []
    said += [f"with {_several(removed['weights'], 'single weight')} set to zero"] if "weights" in removed else []
    return " and ".join(said) or "with nothing removed"


def _several(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def _targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each target: what was there, what is kept, what share left."""
    rows: dict[str, list[int]] = {}
    for site in report.get("sites") or []:
        row = rows.setdefault(f"{_UNITS[site['target']]}s", [0, 0, 0])
        for i, count in enumerate((1, site["n_units"], site["n_kept"])):
            row[i] += count
    for weight in report.get("weights") or []:
        row = rows.setdefault("weights (set to zero)", [0, 0, 0])
        for i, count in enumerate((1, weight["n_entries"], weight["n_entries"] - weight["n_zero"])):
            row[i] += count
    return [
        {
            "target": target,
            "n_sites": n_sites,
            "n_units": f"{n_units:,}",
            "n_kept": f"{n_kept:,}",
            "removed": f"{(n_units - n_kept) / n_units:.1%}" if n_units else "–",
        }
        for target, (n_sites, n_units, n_kept) in rows.items()
    ]


def _tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Counted, measured and estimated numbers, each under its own heading."""
    totals, estimated = report.get("totals") or {}, report.get("estimated") or {}
    measured = report.get("measured") or {}
    latency, files = measured.get("latency_ms") or {}, measured.get("bytes_on_disk") or {}
    on_disk = [("bytes on disk", files.get("dense"), files.get("pruned"))] if files else []
    counts = _pairs(totals.get("dense"), totals.get("pruned"))
    hardware = hardware_words(report)
    tables = (
        (
            "Size",
            "Counted on the saved model.",
            [*((_counted(name, totals), old, new) for name, old, new in counts), *on_disk],
            relative_change,
        ),
        ("Quality", _of_quality(report), _metrics(report), difference),
        _of_parts(report),
        (
            "Speed",
            f"Measured on {hardware}." if hardware else "Measured; the hardware wasn't recorded.",
            [
                (f"milliseconds, batch of {batch}", dense, pruned)
                for batch, dense, pruned in _pairs(latency.get("dense"), latency.get("pruned"))
            ],
            _speedup if is_smaller(report) else no_change,
        ),
        (
            "Estimated",
            "Computed, not measured.",
            _pairs(estimated.get("dense"), estimated.get("pruned")),
            relative_change,
        ),
    )
    return [
        {
            "title": title,
            "note": note,
            "rows": [_row(name, dense, pruned, change(dense, pruned)) for name, dense, pruned in rows],
        }
        for title, note, rows, change in tables
        if rows
    ]


def _of_parts(report: dict[str, Any]) -> tuple[str, str, list[tuple[str, float | None, float | None]], Any]:
    """The table of classes or domains; it is left out where there are none."""
    about, rows = (report.get("measured") or {}).get("by_part") or {}, part_rows(report)
    kind = about.get("of", "class")
    note = f"The {about.get('metric')} of each, by {kind}; first what lost most"
    note += f", {_MOST_PARTS} of {len(rows)}." if len(rows) > _MOST_PARTS else "."
    shown_rows = [
        (f"{name} ({_several(n, 'sample')})", _number(dense), _number(pruned)) for name, n, dense, pruned in rows
    ]
    return f"Quality by {kind}", note, shown_rows[:_MOST_PARTS], difference


def _of_quality(report: dict[str, Any]) -> str:
    if all(dense is None for _, dense, _ in _metrics(report)):
        return "Measured; of the dense model nothing is known here."
    return f"Measured on the same data; dense is {dense_words(report)}."


def _counted(name: str, totals: dict[str, Any]) -> str:
    return f"MACs, {sample_shape(totals)}" if name == "macs" else name


def _row(name: str, dense: float | None, pruned: float | None, change: str) -> dict[str, str]:
    title = _TITLES.get(name, name).replace("|", "\\|")
    return {"name": title, "dense": shown(dense), "pruned": shown(pruned), "change": change}


def _speedup(dense: float | None, pruned: float | None) -> str:
    return f"{dense / pruned:.2f}×" if dense and pruned else ""


def _number(value: Any) -> float | None:
    """A finite number, or nothing: YAML's `.nan` would be refused by the Hub."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _verification(report: dict[str, Any]) -> dict[str, Any] | None:
    found = report.get("verification") or {}
    if _number(found.get("max_difference")) is None:
        return None
    shown = {key: found.get(key) for key in ("inputs", "dtype")}
    return shown | {
        "max_difference": f"{found['max_difference']:.1e}",
        "tolerance": f"{found['tolerance']:.0e}" if _number(found.get("tolerance")) else None,
    }


def _limits(report: dict[str, Any]) -> list[str]:
    metrics, measured = _metrics(report), report.get("measured") or {}
    limits = ["What is known of the limits and biases of the model it was made from holds here too."]
    if any(pruned is not None for _, _, pruned in metrics):
        limits.append(
            "One number hides a spread: pruning costs rare classes and unusual inputs most. Check on data of your own."
        )
    else:
        limits.append("No metric was recorded: nothing here says how much quality was lost. Evaluate before use.")
    if metrics and not measured.get("by_part"):
        limits.append("How much quality fell by class or domain was not measured.")
    if measured.get("latency_ms"):
        limits.append("Speed holds for the hardware named; fewer parameters gain less at small batches.")
    else:
        limits.append("Speed was not measured.")
    if _verification(report) is None:
        limits.append("No comparison of the smaller model with the masked one is recorded.")
    return limits


def _name(path_or_id: str | None) -> str:
    """The last part of a path or Hub id, or the package of `package:NAME/PATH`."""
    if path_or_id and path_or_id.startswith("package:"):
        return path_or_id.removeprefix("package:").split("/")[0]
    return Path(path_or_id).name if path_or_id else "pruned"


def _sentence(text: str | None) -> str | None:
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else None
