"""Times reading a prompt and writing after it, one sequence, for any engine. Standard library only."""

from __future__ import annotations

import statistics
import time
from typing import Any, Protocol

from watch import Watch, wait_until_quiet

PREFILLS = 3
WARM_UP_PROMPT, WARM_UP_TOKENS = 8, 2


class Engine(Protocol):
    """A model that generates greedily."""

    def set_threads(self, threads: int) -> None:
        """For all that follows."""

    def prefill(self, tokens: list[int]) -> int:
        """Begins a sequence; returns the token after it."""

    def step(self, token: int) -> int:
        """Appends a token to the sequence; returns the one after it."""


def speeds(engine: Engine, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures with each number of threads.

    Args:
        engine: the model.
        job: ``threads``, a list; ``prompt``, token ids; ``new_tokens``, at least 2; ``patience_s``,
            seconds to wait for a quiet machine, is reduced to what is left of them.
    """
    return [_speed(engine, job, threads) for threads in job["threads"]]


def _speed(engine: Engine, job: dict[str, Any], threads: int) -> dict[str, Any]:
    engine.set_threads(threads)
    generate(engine, job["prompt"][:WARM_UP_PROMPT], WARM_UP_TOKENS)
    job["patience_s"] = wait_until_quiet(job["patience_s"])
    machine = Watch()
    prefill_s = []
    for _ in range(PREFILLS):
        begin = time.perf_counter()
        token = engine.prefill(job["prompt"])
        prefill_s.append(time.perf_counter() - begin)
    tokens, token_s = extend(engine, token, job["new_tokens"])
    cut = statistics.quantiles(token_s, n=5)
    return {
        "threads": threads,
        "prefill_tokens_per_s": len(job["prompt"]) / statistics.median(prefill_s),
        "generation_tokens_per_s": 1 / statistics.median(token_s),
        "token_ms": {
            "p20": 1e3 * cut[0],
            "median": 1e3 * statistics.median(token_s),
            "p80": 1e3 * cut[-1],
        },
        "tokens": tokens,
        "others": machine.others(),
    }


def generate(engine: Engine, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """Tokens after a prompt, and the seconds that each took but the first."""
    return extend(engine, engine.prefill(prompt), new_tokens)


def extend(engine: Engine, token: int, new_tokens: int) -> tuple[list[int], list[float]]:
    """The same, from the first token on, which ``engine.prefill`` gave."""
    tokens, token_s = [token], []
    for _ in range(new_tokens):
        begin = time.perf_counter()
        tokens.append(engine.step(tokens[-1]))
        token_s.append(time.perf_counter() - begin)
    return tokens, token_s
