"""Fine-tunes a compressed model with LoRA, as QLoRA does: frozen weights of few bits, small adapters that are trained.

    python examples/finetune_lora.py            # SmolLM2-135M-Instruct on Wikipedia articles, minutes on two cores
    python examples/finetune_lora.py --smoke    # a tiny random model, seconds

Compresses a model, trains adapters on text for some steps, saves both, loads both again, and checks that what was loaded
has the same loss. Needs ``pip install dcext[peft]``.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import dcext
from dcext.hub import load_float_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "third_party"))
console = Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
HELD_OUT = 8  # windows from the end of the text, which are not trained on
AVERAGED = 5  # steps of the first and of the last mean loss


@app.command()
def main(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model folder, .gguf file, or name on the hub. SmolLM2-135M-Instruct if none is given."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to train on. Articles of Wikipedia (enwik8) if none."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for model and adapter; temporary if none."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="How to compress: int8, or data-free for fewer bits.")
    ] = "int8",
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=2)] = 50,
    batch: Annotated[int, typer.Option(help="Windows per step.", min=1)] = 2,
    context: Annotated[int, typer.Option(help="Tokens per window.", min=8)] = 128,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, after a short warm-up.")] = 5e-4,
    dora: Annotated[
        bool, typer.Option("--dora", help="Train magnitudes too (DoRA); decodes each layer whole.")
    ] = False,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Recompute activations: less memory, slower."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of adapters and order of the text.")] = 0,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A tiny random model and made-up text; seconds.")
    ] = False,
) -> None:
    """Fine-tunes a compressed language model with LoRA and prints what was measured as JSON."""
    torch.manual_seed(seed)
    base, windows = _tiny(context) if smoke else _real(model, text, context)
    # Float activations: gradients are exact. With int8 ones they pass straight through the rounding.
    dcext.compress_(base, dcext.CompressionConfig(recipe=recipe, activations="none"))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(base, config)
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})

    held_out, trained_on = windows[-HELD_OUT:], windows[:-HELD_OUT]
    before = evaluate(adapted, held_out)
    began = time.monotonic()
    losses = train(adapted, batches(trained_on, batch, seed), steps, learning_rate)
    seconds = time.monotonic() - began
    after = evaluate(adapted, held_out)

    trained_parameters, _ = adapted.get_nb_trainable_parameters()

    with tempfile.TemporaryDirectory() as temporary:
        again = evaluate(save_and_load(adapted, output or Path(temporary)), held_out)
    result = {
        "first_mean_loss": _mean(losses[:AVERAGED]),
        "last_mean_loss": _mean(losses[-AVERAGED:]),
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "held_out_loss_loaded": again,
        "trained_parameters": trained_parameters,
        "bits_per_weight": base.dcext_report.bits_per_weight(),
        "steps": steps,
        "seconds": round(seconds, 1),
        "instruction_set": dcext.build_info()["isa"],
    }
    print(json.dumps(result, indent=2))
    if again != after:
        raise RuntimeError(f"held-out loss of what was loaded: expected {after}, got {again}")


def train(
    model: nn.Module, source: Iterator[Tensor], steps: int, learning_rate: float
) -> list[float]:
    """Trains what can be trained of a model.

    Args:
        model: a causal language model of transformers.
        source: ``(batch, tokens)`` int64, one per step.
        steps: how many.
        learning_rate: of AdamW; rises from zero over the first tenth of the steps.

    Returns:
        The loss of each step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) * 10 / steps))
    losses = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    model.train()
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        task = progress.add_task("training", total=steps)
        for ids in itertools.islice(source, steps):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            warmup.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"training, loss {losses[-1]:.3f}")
    return losses


@torch.inference_mode()
def evaluate(model: nn.Module, windows: Tensor) -> float:
    """Mean loss per token of windows ``(count, tokens)``."""
    model.eval()
    return _mean([model(input_ids=row[None], labels=row[None]).loss.item() for row in windows])


def save_and_load(adapted: PeftModel, folder: Path) -> PeftModel:
    """Saves an adapter and its compressed model, and loads both again.

    Returns:
        The loaded model with the loaded adapter.
    """
    adapted.save_pretrained(folder / "adapter")
    dcext.save_pretrained(adapted.unload(), folder / "model")
    return PeftModel.from_pretrained(dcext.from_pretrained(folder / "model"), folder / "adapter")


def batches(windows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Windows in random order, ``size`` at a time, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        yield from (windows[rows] for rows in order.split(size) if len(rows) == size)


def _real(model: str | None, text: Path | None, context: int) -> tuple[nn.Module, Tensor]:
    if model is None or text is None:
        import fetch
        import wiki_text

        model = model or str(fetch.smollm2_gguf())
        text = text or wiki_text.enwik8_text("calibration")
    loaded, tokenizer = load_float_model(model, "float32")
    characters = text.read_text(encoding="utf-8")[:2_000_000]
    ids = torch.tensor(tokenizer(characters)["input_ids"])
    count = len(ids) // context
    if count < 2 * HELD_OUT:
        raise ValueError(
            f"text: expected at least {2 * HELD_OUT * context} tokens, got {len(ids)} in {text}"
        )
    return loaded, ids[: count * context].view(count, context)


def _tiny(context: int) -> tuple[nn.Module, Tensor]:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    sequence = (torch.arange(40 * context) * 7 + torch.arange(40 * context) // 5) % 64
    return LlamaForCausalLM(config).eval(), sequence.view(40, context)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    app()
