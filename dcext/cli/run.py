"""Commands that run a model: eval, generate."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dcext.cli.inputs import load_file, read_text
from dcext.cli.output import (
    JsonOption,
    OutFolder,
    byte_progress,
    console,
    print_json,
    token_progress,
)

DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ..")]
HostMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Memory for weights, such as 4GiB: those that do not fit are read from disk while the model runs.",
        metavar="SIZE",
    ),
]
DeviceMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="With a GPU: its memory for weights, such as 8GiB; decoder blocks that do not fit are copied to it while the "
        "model runs.",
        metavar="SIZE",
    ),
]
ModeOption = Annotated[
    str,
    typer.Option(
        help="With --device-memory, how weights are copied there: device (and decoded there), host (decoded on the way), raw, auto."
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option(
        help="Where each layer is to be: a file that `dcext plan -o` wrote; with --device cuda where it is for a GPU.",
        metavar="FILE",
    ),
]
PageCacheOption = Annotated[
    bool,
    typer.Option(
        help="With --host-memory: let the system keep files in memory that is not counted."
    ),
]


def evaluate(
    folder: OutFolder,
    text: Annotated[Path, typer.Option(help="UTF-8 text to predict.")],
    context: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(help="Use only so many tokens of the text.", min=2)
    ] = None,
    device: DeviceOption = "cpu",
    host_memory: HostMemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    mode: ModeOption = "auto",
    page_cache: PageCacheOption = False,
    plan: PlanOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on a text, and tokens per second."""
    import torch

    from dcext.evaluate import perplexity
    from dcext.nn.placement import raise_if_damaged
    from dcext.offloading.state import offload_of

    # Enough text for max_tokens, whatever the tokenizer: a token has at least one byte.
    content = read_text("--text", text, -1 if max_tokens is None else 16 * max_tokens + 1024)
    model, tokenizer = _load(
        folder,
        device=device,
        host_memory=host_memory,
        device_memory=device_memory,
        mode=mode,
        page_cache=page_cache,
        plan=plan,
    )
    ids = torch.tensor(tokenizer(content, verbose=False).input_ids)[:max_tokens].to(device)
    with token_progress("evaluating", ids.numel()) as advance:
        result = perplexity(model, ids, context=context, progress=advance)
    raise_if_damaged(model)
    if as_json:
        offload = offload_of(model)
        streamed = None if offload is None else offload.statistics()
        stream = {} if streamed is None else {"stream": streamed.to_dict()}
        print_json({**result.to_dict(), **stream})
        return
    console().print(
        f"perplexity {result.perplexity:.3f} over {result.tokens} tokens (context {context}), "
        f"{result.tokens_per_s:.0f} tokens/s, peak memory {result.peak_rss_bytes / 1e6:.0f} MB",
        highlight=False,
        soft_wrap=True,
    )


def generate(
    folder: OutFolder,
    prompt: Annotated[
        str, typer.Option(help="Text to continue, or the user's message with --chat.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.", min=1)] = 100,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token.", min=0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling, with a temperature above 0.")] = 0,
    chat: Annotated[
        bool, typer.Option(help="Wrap the prompt in the model's chat template.")
    ] = False,
    device: DeviceOption = "cpu",
    host_memory: HostMemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    mode: ModeOption = "auto",
    page_cache: PageCacheOption = False,
    plan: PlanOption = None,
    statistics: Annotated[
        bool, typer.Option(help="Print where the weights were and what streaming them took.")
    ] = False,
) -> None:
    """Continue a prompt; tokens appear as they are made."""
    import torch

    from dcext.nn.placement import raise_if_damaged
    from dcext.offloading.state import offload_of

    if not prompt:
        raise ValueError("--prompt: expected text to continue, got ''")
    if not temperature < math.inf:
        raise ValueError(f"--temperature: expected a number, got {temperature}")
    model, tokenizer = _load(
        folder,
        device=device,
        host_memory=host_memory,
        device_memory=device_memory,
        mode=mode,
        page_cache=page_cache,
        plan=plan,
    )
    if chat and not tokenizer.chat_template:
        raise ValueError(
            f"--chat: expected a tokenizer with a chat template in {folder}, found none"
        )
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    if inputs.input_ids.numel() == 0:
        raise ValueError(f"--prompt: expected tokens, found none in {prompt!r}")
    inputs = inputs.to(device)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    if tokenizer.pad_token_id is None:
        sampling["pad_token_id"] = tokenizer.eos_token_id
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    raise_if_damaged(model)
    if statistics:
        offload = offload_of(model)
        text = "all weights in memory" if offload is None else str(offload)
        print(text, file=sys.stderr)


def _load(folder: str, plan: Path | None, **options: Any) -> tuple[Any, Any]:
    import dcext
    from dcext.format import CheckpointReader
    from dcext.hub import load_tokenizer
    from dcext.policy.plan import load_plan

    options["plan"] = None if plan is None else load_file("--plan", plan, load_plan)
    with byte_progress("loading", CheckpointReader(folder).tensor_nbytes) as advance:
        model = dcext.from_pretrained(folder, progress=advance, **options)
    return model, load_tokenizer(folder)
