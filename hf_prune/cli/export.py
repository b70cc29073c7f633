"""`hf-prune export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    directory: Annotated[str, typer.Argument(help="The directory of a pruned model, or its id on the Hub.")],
    to: Annotated[str, typer.Option("--format", help="onnx, openvino or executorch.")],
    output: Annotated[Path | None, typer.Option(help="Where to; DIRECTORY-FORMAT if not given.")] = None,
    dense: Annotated[
        str | None, typer.Option(help="The model before pruning, timed beside it; by default that of the report.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the inputs that it is compared and timed on.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Of the inputs, in tokens.")] = 128,
) -> None:
    """Write a pruned model for another runtime, compare the outputs, and time it beside the dense model there.

    It goes through Transformers' own exporters. A package that is missing is said before the model is read, and a file that
    computes something else is not written.

    Examples:

    ```
    hf-prune export outputs/quickstart --format onnx
    hf-prune export outputs/quickstart --format openvino --output served --length 64
    ```
    """
    from hf_prune.cli.run import quiet
    from hf_prune.export.checkpoint import dense_of, load
    from hf_prune.export.runtimes import export as export_to
    from hf_prune.export.runtimes import require_runtime
    from hf_prune.report.report import plain_console
    from hf_prune.report.table import hardware_words

    require_runtime(to)  # before the model is read
    quiet()
    target = output or Path(f"{directory.rstrip('/').rpartition('/')[2]}-{to}")
    out = plain_console()

    def say(line: str) -> None:
        out.print(line, markup=False, highlight=False, soft_wrap=True)

    model = load(directory)
    found = export_to(model, to, target, dense=dense_of(directory, model, dense), batch_size=batch_size, length=length)
    say(f"written to {target}: outputs differ from PyTorch's by at most {found.max_difference:.1e} of the largest")
    times = found.latency_ms
    said = f"measured in this runtime: {times['pruned']:.3g} ms"
    if "dense" in times:
        said += f", dense {times['dense']:.3g} ms: {times['dense'] / times['pruned']:.2f}× as fast"
    else:
        said += "; of the dense model nothing is known here, --dense says where it is"
    shape = next(iter(found.inputs.values()))
    say(f"{said} (input {' × '.join(map(str, shape))}, on {hardware_words({'hardware': found.hardware})})")
