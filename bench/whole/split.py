"""Where the time of a token goes: products with weights, other operators of torch, Python and dispatch."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn

import dcext
from whole.timing import Engine, generate

SPLIT_TOKENS = 16
NARROW_HEAD, NARROW_WIDTH, NARROW_VOCABULARY = 8, 32, 64


def split_token(
    engine: Any, engine_of: Callable[[Any], Engine], job: dict[str, Any]
) -> dict[str, float]:
    """Milliseconds of a token, one thread, medians.

    Python and dispatch is what a token costs a model with as many layers and operators that are too narrow to
    compute anything, its products left out. What is left of the token are other operators: attention, norms, the
    growing cache.

    Args:
        engine: of the model.
        engine_of: makes the engine of another one.
        job: as for ``timing.speeds``.
    """
    engine.set_threads(1)
    token_ms, products_ms = _token_and_products_ms(engine, job)
    narrow_ms, narrow_products_ms = _token_and_products_ms(engine_of(narrow(engine.model)), job)
    overhead_ms = narrow_ms - narrow_products_ms
    return {
        "token_ms": token_ms,
        "products_ms": products_ms,
        "python_ms": overhead_ms,
        "others_ms": token_ms - products_ms - overhead_ms,
    }


def narrow(model: Any) -> Any:
    """A float model with the layers and heads of this one, and next to nothing to compute in each."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    config.head_dim = NARROW_HEAD
    config.hidden_size = NARROW_HEAD * config.num_attention_heads
    config.intermediate_size = NARROW_WIDTH
    config.vocab_size = NARROW_VOCABULARY
    return AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()


def _token_and_products_ms(engine: Engine, job: dict[str, Any]) -> tuple[float, float]:
    prompt = [token % NARROW_VOCABULARY for token in job["prompt"]]
    generate(engine, prompt, 2)
    token_s, products_s = [], []
    with timed_products() as spent:
        token = engine.prefill(prompt)
        for _ in range(min(job["new_tokens"], SPLIT_TOKENS)):
            spent[0] = 0.0
            begin = time.perf_counter()
            token = engine.step(token)
            token_s.append(time.perf_counter() - begin)
            products_s.append(spent[0])
    return 1e3 * statistics.median(token_s), 1e3 * statistics.median(products_s)


@contextmanager
def timed_products() -> Iterator[list[float]]:
    """Adds the seconds that linear layers take meanwhile, compressed or not, to the one number that it gives."""
    spent = [0.0]

    def timed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: nn.Module, x: Any) -> Any:
            begin = time.perf_counter()
            y = forward(self, x)
            spent[0] += time.perf_counter() - begin
            return y

        return wrapper

    with ExitStack() as patches:
        for kind in (dcext.DCLinear, nn.Linear):
            patches.enter_context(patch.object(kind, "forward", timed(kind.forward)))
        yield spent
