"""`hf-prune export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    directory: Annotated[str, typer.Argument(help="The directory of a pruned model, or its id on the Hub.")],
    to: Annotated[str, typer.Option("--format", help="onnx, openvino, executorch or gguf.")],
    output: Annotated[Path | None, typer.Option(help="Where to; DIRECTORY-FORMAT if not given.")] = None,
    dense: Annotated[
        str | None, typer.Option(help="The model before pruning, timed beside it; by default that of the report.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the inputs that it is compared and timed on.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Of the inputs, in tokens.")] = 128,
    tokenizer_from: Annotated[
        Path | None, typer.Option(help="gguf: a GGUF of the dense model, whose tokenizer is copied.", exists=True)
    ] = None,
) -> None:
    """Write a pruned model for another runtime, compare the outputs, and time it beside the dense model there.

    It goes through Transformers' own exporters, to GGUF (decoders of the Llama layout, for llama.cpp) through the package gguf.
    What is missing or can't be said is told before the model is read, and a file that computes something else is not written.

    Examples:

    ```
    hf-prune export outputs/quickstart --format onnx
    hf-prune export outputs/quickstart --format openvino --output served --length 64
    hf-prune export outputs/smollm2-mixed --format gguf --tokenizer-from dense.gguf
    ```
    """
    from hf_prune.cli.run import quiet
    from hf_prune.export.checkpoint import dense_of, load, read_config
    from hf_prune.export.gguf import FILE, export_gguf, require_writable
    from hf_prune.export.runtimes import RUNTIMES, require_empty, require_runtime
    from hf_prune.export.runtimes import export as export_to
    from hf_prune.report.report import plain_console
    from hf_prune.report.table import hardware_words

    # all that can be known before the model is read
    if to != "gguf":
        require_runtime(to)
    target = require_empty(output or f"{directory.rstrip('/').rpartition('/')[2]}-{to}")
    config = read_config(directory)
    quiet()
    out = plain_console()

    def say(line: str) -> None:
        out.print(line, markup=False, highlight=False, soft_wrap=True)

    if to == "gguf":
        require_writable(config)
        written = export_gguf(load(directory), target, dtype=config.dtype, tokenizer_from=tokenizer_from)
        say(f"written to {target / FILE}, architecture {written.architecture}")
        if written.max_difference is None:
            say("read back and compared weight by weight; Transformers doesn't read this architecture, llama.cpp does")
        else:
            say(f"read by Transformers, logits differ by at most {written.max_difference:.1e} of the largest")
        if not written.has_tokenizer:
            say("it has no tokenizer, so it takes token ids only: copy that of the dense model with --tokenizer-from")
        return
    model = load(directory)
    say(f"exporting to {to}, and the dense model beside it where it is known: this takes {RUNTIMES[to].takes}")
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
