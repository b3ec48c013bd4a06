"""Multiple-choice questions as EleutherAI's lm-evaluation-harness (lm-eval) asks them, and a model that answers fast.

Prompts, choices and metrics are the harness's own tasks; questions are the validation sets that ``fetch.tasks`` has,
instead of the hub's. ``TreeLM`` is its interface to a model: it reads what requests have in common once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from torch import Tensor

import fetch

HARNESS = f"lm-eval {lm_eval.__version__}"

datasets.disable_progress_bars()
logging.getLogger("lm_eval.api.task").addFilter(
    lambda record: "Custom kwargs can be passed" not in record.getMessage()
)

# Task -> its folder in the archive of data sets, and its folder among the harness's tasks.
TASKS = {
    "piqa": ("piqa/plain_text", "piqa"),
    "arc_easy": ("ai2_arc/ARC-Easy", "arc"),
    "hellaswag": ("hellaswag/none", "hellaswag"),
    "winogrande": ("winogrande/winogrande_xl", "winogrande"),
    "openbookqa": ("openbookqa/main", "openbookqa"),
    "sciq": ("sciq/none", "sciq"),
}
DEFAULT_TASKS = ("piqa", "arc_easy", "hellaswag", "winogrande")
PACK_TOKENS = 512  # per forward pass: enough that decoding the weights costs little, short for dense attention
# Allowed error per token: bfloat16 models reach 0.1, one that ignores positions 0.8; see TreeLM.check.
TOLERANCE_NATS = 0.3
CHECKED_TEXTS = [
    (f"Question: {question}\nAnswer:", f" {choice}")
    for question in ("Why is the sky blue?", "What do bees make?")
    for choice in ("Air scatters blue light.", "It is painted.", "Honey and wax.")
]

# Tokens of context and continuation; or the nodes of a tree that are scored, and the tokens that follow them.
TokenPair = tuple[list[int], list[int]]


def questions(task: str) -> datasets.Dataset:
    """The validation set of a task.

    Raises:
        fetch.FetchError: it is not in the cache and cannot be downloaded.
    """
    folder = fetch.tasks() / TASKS[task][0] / "validation"
    return datasets.Dataset.from_file(str(folder / "data-00000-of-00001.arrow"), in_memory=True)


def load_task(task: str, items: int) -> Any:
    """The harness's own task of that name, on the first ``items`` questions of our file.

    Raises:
        ValueError: there are fewer questions.
    """
    data = questions(task)
    if items > len(data):
        raise ValueError(f"{task}: items: expected at most {len(data)}, got {items}")
    splits = {"validation": data.select(range(items))}
    changes = {
        "task": task,
        "custom_dataset": lambda **metadata: splits,
        "training_split": None,
        "test_split": None,
        "num_fewshot": 0,
    }
    folder = Path(lm_eval.__file__).parent / "tasks" / TASKS[task][1]
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    return manager.load({"group": "zeroshot", "task": [changes]})["tasks"][task]


def score(lm: TemplateLM, task: str, items: int) -> dict[str, str]:
    """Metric to one character per question, ``1`` where it was answered correctly."""
    report = lm_eval.evaluate(lm, {"tasks": {task: load_task(task, items)}}, bootstrap_iters=0)
    samples = sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
    metrics = [metric for metric in ("acc", "acc_norm") if metric in samples[0]]
    return {m: "".join(str(int(sample[m])) for sample in samples) for m in metrics}


class TokenTree:
    """Token sequences with their common beginnings merged; node ``i`` is one token that the model has to read.

    Attributes:
        tokens, parents, depths: per node its token, its predecessor (-1 for none) and its position in its sequences.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, sequence: Sequence[int]) -> list[int]:
        """Adds a sequence; returns the node of each of its tokens."""
        nodes, parent = [], -1
        for depth, token in enumerate(sequence):
            node = self._children.setdefault((parent, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(depth)
            nodes.append(node)
            parent = node
        return nodes

    def visible(self) -> Tensor:
        """Bool (n, n): row ``i`` is true at node ``i`` and all nodes before it in its sequences."""
        matrix = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                matrix[node] |= matrix[parent]
        return torch.from_numpy(matrix)


class TreeLM(TemplateLM):
    """A causal transformers model for the harness that reads what choices and questions have in common only once.

    Requests are merged into trees of about ``PACK_TOKENS`` nodes; attention is masked to the ancestors of each node and
    positions are depths, so that each token sees what it would see alone. Logits are computed where they are scored.

    Args:
        model: takes ``attention_mask`` (1, 1, n, n), ``position_ids`` and ``logits_to_keep``, as Llama and its like do.
        tokenizer: the model's own; special tokens are added as it adds them by itself.
        progress: called with the numbers of requests done and in all, after each forward pass.

    Attributes:
        tokens_run: tokens that went through the model.
    """

    def __init__(
        self, model: Any, tokenizer: Any, progress: Callable[[int, int], None] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.progress = progress or (lambda done, total: None)
        self.max_length = int(model.config.get_text_config().max_position_embeddings)
        self.tokens_run = 0

    @property
    def eot_token_id(self) -> int:
        """End-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; by default with the tokenizer's special tokens unless ``string`` begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(
                self.tokenizer.decode([self.prefix_token_id])
            )
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods in nats, and whether each continuation is the greedy one, without the harness's own bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = []
        for tree, scored in self._trees(pairs):
            results += self._run(tree, scored)
            self.progress(len(results), len(pairs))
        return results

    def _trees(self, pairs: Sequence[TokenPair]) -> Iterator[tuple[TokenTree, list[TokenPair]]]:
        """Requests in order, merged; with each tree the scored nodes and the tokens that follow them, per request."""
        tree, scored = TokenTree(), []
        for index, (context, continuation) in enumerate(pairs):
            nodes = tree.add(self._input(context, continuation))
            scored.append((nodes[-len(continuation) :], continuation))
            if len(tree.tokens) >= PACK_TOKENS or index + 1 == len(pairs):
                yield tree, scored
                tree, scored = TokenTree(), []

    def _input(self, context: list[int], continuation: list[int]) -> list[int]:
        """What the model reads: all tokens but the last, which is only predicted."""
        tokens = [*context, *continuation][:-1]
        if not context or not continuation or len(tokens) > self.max_length:
            raise ValueError(
                f"request: expected context and continuation of at least 1 token each and {self.max_length + 1} in all, "
                f"got {len(context)} and {len(continuation)}"
            )
        return tokens

    @torch.inference_mode()
    def _run(self, tree: TokenTree, scored: Sequence[TokenPair]) -> list[tuple[float, bool]]:
        """One forward pass; per request the log-likelihood of its targets in nats, and whether they are greedy."""
        rows = sorted({node for nodes, _ in scored for node in nodes})
        row_of = {node: row for row, node in enumerate(rows)}
        dtype = self.model.dtype
        shown = torch.zeros((), dtype=dtype)
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype)
        logits = self.model(
            input_ids=torch.tensor([tree.tokens]),
            attention_mask=torch.where(tree.visible(), shown, hidden)[None, None],
            position_ids=torch.tensor([tree.depths]),
            logits_to_keep=torch.tensor(rows),
            use_cache=False,
        ).logits[0]
        logits = logits.float()
        normalizer, greedy = logits.logsumexp(-1), logits.argmax(-1)
        self.tokens_run += len(tree.tokens)
        results = []
        for nodes, continuation in scored:
            index, target = torch.tensor([row_of[n] for n in nodes]), torch.tensor(continuation)
            total = (logits[index, target] - normalizer[index]).sum()
            results.append((float(total), bool((greedy[index] == target).all())))
        return results

    @torch.inference_mode()
    def check(self) -> float:
        """Scores a few texts merged and one by one, to see that the model heeds mask and positions.

        To be called with float activations: the two ways differ in the order of attention's sums, and int8 activations
        amplify that by rounding the other way, to 0.1 nats per token and more in models with large outliers.

        Returns:
            The largest difference, in nats per token.

        Raises:
            ValueError: it is above ``TOLERANCE_NATS``.
        """
        pairs = [self._encode_pair(context, choice) for context, choice in CHECKED_TEXTS]
        merged = [r for tree, scored in self._trees(pairs) for r in self._run(tree, scored)]
        largest = 0.0
        for (context, continuation), (found, _) in zip(pairs, merged, strict=True):
            ids = torch.tensor([self._input(context, continuation)])
            logits = self.model(input_ids=ids, use_cache=False).logits[0, -len(continuation) :]
            logprobs = logits.float().log_softmax(-1)
            expected = float(logprobs.gather(1, torch.tensor(continuation)[:, None]).sum())
            largest = max(largest, abs(found - expected) / len(continuation))
        if not largest <= TOLERANCE_NATS:
            raise ValueError(
                f"{type(self.model).__name__}: expected merged and single texts to differ by at most "
                f"{TOLERANCE_NATS} nats per token, found {largest:.3f}: it does not heed attention_mask or position_ids"
            )
        return largest

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not what multiple-choice tasks ask for."""
        raise NotImplementedError("TreeLM: multiple-choice tasks only")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Not what multiple-choice tasks ask for."""
        raise NotImplementedError("TreeLM: multiple-choice tasks only")
