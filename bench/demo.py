"""The demo: a real model compressed, verified, measured against its float and raw INT8 selves, and put to use.

    python bench/demo.py [--output FILE.json]

Every row of the table is measured in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hardware import ROOT, hardware
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(ROOT / "third_party"))

import fetch
import wiki_text

EVAL_TOKENS = 4096
CONTEXT = 512
NEW_TOKENS = 32

# Label and the options of `dcext compress`; None is the float model.
ROWS: dict[str, list[str] | None] = {
    "float32": None,
    "INT8 raw, per row": ["--recipe", "int8", "--codec", "raw"],
    "dcext rate, zstd": ["--ratio", "2.2"],
    "dcext rate, packed": ["--codec", "packed"],
}
ANSWERS = "dcext rate, packed"
PROMPT = "Explain in one sentence why the sky is blue."


def dcext(*arguments: str, capture: bool = False) -> str:
    """Runs the command line of this environment; its progress bars go to the terminal."""
    command = [sys.executable, "-c", "from dcext.cli.app import main; main()", *arguments]
    result = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    return result.stdout or ""


def measure(source: str) -> dict[str, Any]:
    """Perplexity, speed and peak memory of a model in this process: a dcext folder, else a float model."""
    import torch

    from dcext.evaluate import generation_speed, peak_rss_bytes, perplexity
    from dcext.hub import load_float_model, load_tokenizer
    from dcext.pretrained import from_pretrained

    if Path(source).suffix == ".gguf":
        model, tokenizer = load_float_model(source)
        load_rss = None  # dominated by the conversion from GGUF
    else:
        model, tokenizer = from_pretrained(source), load_tokenizer(source)
        load_rss = peak_rss_bytes()
    text = wiki_text.enwik8_text("evaluation").read_text(encoding="utf-8")[: 16 * EVAL_TOKENS]
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)[:EVAL_TOKENS]
    speed = generation_speed(model, ids[:CONTEXT], new_tokens=NEW_TOKENS)
    result = perplexity(model, ids, context=CONTEXT)
    return {
        "perplexity": result.perplexity,
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        "generation_tokens_per_s": speed.generation_tokens_per_s,
        "weights_nbytes": sum(t.nbytes for t in unique_tensors(model)),
        "load_rss_bytes": load_rss,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def unique_tensors(model: Any) -> list[Any]:
    """Parameters and buffers, those that modules share counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return list({tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}.values())


def folder_of(label: str, parent: Path) -> Path:
    return parent / label.replace(" ", "-").replace(",", "")


def measure_row(label: str, gguf: Path, folder: Path) -> dict[str, Any]:
    options = ROWS[label]
    row: dict[str, Any] = {
        "label": label,
        "disk_nbytes": gguf_float_nbytes(gguf),
        "bits_per_weight": 32.0,
    }
    source = str(gguf)
    if options is not None:
        source = str(folder_of(label, folder))
        print(f"\n{label}", file=sys.stderr)
        if "int8" not in options:
            options = [*options, "--calibration", str(wiki_text.enwik8_text("calibration"))]
        summary = json.loads(
            dcext("compress", str(gguf), "-o", source, *options, "--json", capture=True)
        )
        row["compress_s"] = summary["seconds"]
        dcext("verify", source)
        row["disk_nbytes"] = summary["nbytes"]
        row["bits_per_weight"] = summary["bits_per_weight"]
    else:
        print(f"\n{label}: measuring", file=sys.stderr)
    command = [sys.executable, __file__, "--measure", source]
    output = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return {**row, **json.loads(output.stdout)}


def gguf_float_nbytes(gguf: Path) -> int:
    """What the model takes on disk in float32: the form that is compressed, not the 4-bit one it is shipped in."""
    from gguf import GGUFReader

    return sum(4 * int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="SmolLM2-135M-Instruct, embedding and lm_head included")
    table.add_column("")
    headings = (
        "on disk",
        "bits/weight",
        "compressed in",
        "perplexity",
        "prefill",
        "generation",
        "weights",
        "peak memory",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["label"],
            f"{row['disk_nbytes'] / 1e6:.0f} MB",
            f"{row['bits_per_weight']:.2f}",
            f"{row['compress_s']:.0f} s" if "compress_s" in row else "",
            f"{row['perplexity']:.2f}",
            f"{row['prefill_tokens_per_s']:.0f} tok/s",
            f"{row['generation_tokens_per_s']:.1f} tok/s",
            f"{row['weights_nbytes'] / 1e6:.0f} MB",
            f"{row['peak_rss_bytes'] / 1e6:.0f} MB",
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(
        f"perplexity: {EVAL_TOKENS} tokens of Wikipedia, context {CONTEXT}; prefill: {CONTEXT} tokens; "
        f"generation: {NEW_TOKENS} tokens after them\n{hardware()['line']}",
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    gguf = fetch.smollm2_gguf()
    wiki_text.enwik8_text("evaluation")
    wiki_text.enwik8_text("calibration")
    with tempfile.TemporaryDirectory(prefix="dcext-demo-") as folder:
        rows = [measure_row(label, gguf, Path(folder)) for label in ROWS]
        show(rows)
        print(f"\n> {PROMPT}")
        last = str(folder_of(ANSWERS, Path(folder)))
        dcext("generate", last, "--chat", "--prompt", PROMPT, "--max-new-tokens", "60")
    if arguments.output:
        report = {"hardware": hardware(), "rows": rows}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
