"""One pass over all blocks of a model, in which each is quantized as it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dcext.calibrate.blocks import Block, Call, walk
from dcext.calibrate.coded import UNREACHED, CodedLayer
from dcext.calibrate.group_recipe import GroupRecipe
from dcext.calibrate.inputs import ModelInputs
from dcext.calibrate.job import Job
from dcext.calibrate.kept import load_block, save_block
from dcext.calibrate.layers import input_hooks, layer_rows, same_rows, write_matrix
from dcext.calibrate.replay import Chain, Replay, ReplayError
from dcext.calibrate.trace import Trace
from dcext.nn.matrix import matrix_of
from dcext.quantize.statistics import InputStatistics

SENSITIVITY_TOKENS = 8192


def stream_dtype() -> torch.dtype:
    """What activations are computed in: bfloat16 where the CPU multiplies it fast, else float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


class BlockRun:
    """One pass over all blocks."""

    def __init__(
        self,
        job: Job,
        inputs: ModelInputs,
        trace: Trace,
        recipe: GroupRecipe,
        later: dict[str, InputStatistics],
        share: float,
        trial: bool = False,
    ) -> None:
        """Prepares a pass; with ``trial`` the recipe only learns, and nothing is quantized."""
        self._job = job
        self._inputs = inputs
        self._trace = trace
        self._recipe = recipe
        self._share = share
        self._trial = trial
        self._resume = None if trial else job.resume
        self._dtype = stream_dtype()
        self._coded: dict[str, CodedLayer] = {}  # by owner, until they are emitted
        self._emitted: set[str] = set()
        self._names: dict[str, list[str]] = {}  # of the layers to compress, by owner
        for name in job.names:
            self._names.setdefault(trace.owners.get(name, name), []).append(name)
        self._later = later
        self._later_weight = inputs.windows / inputs.spread(SENSITIVITY_TOKENS).windows
        self._replay: Replay | None = None
        self._chain = Chain()

    def run(self) -> None:
        """Runs it, from where an earlier pass was interrupted."""
        calls = len(self._trace.sequence)
        if self._resume is not None:
            self._replay = Replay.load(self._resume)
        try:
            self._walk(calls)
        except ReplayError:
            assert self._replay is not None
            self._replay.hidden = None  # run the calls that are done again
            self._walk(calls)
        if self._resume is not None and (self._replay is None or self._replay.calls < calls):
            self._resume.save("state", {}, {"calls": calls, "recipe": self._recipe.state()})
        if not self._trial:
            self._round_unreached()

    def _walk(self, calls: int) -> None:
        if self._replay is not None:
            self._restore(self._replay)
            if self._replay.calls == calls:
                for index in range(calls):
                    self._emit(index)
                return
        self._chain = Chain()
        count = 0

        def on_call(call: Call) -> Any:
            nonlocal count
            count += 1
            expected = self._trace.sequence[call.index]
            if call.block.name != expected:
                raise ValueError(
                    f"calibration: expected the same calls of blocks for all inputs, {expected} as number "
                    f"{call.index}, got {call.block.name}"
                )
            return self._on_call(call)

        model, blocks = self._job.model, self._trace.blocks
        with self._job.source.skeleton(blocks), torch.no_grad():
            walk(model, blocks, self._inputs, on_call, self._dtype, calls)
        if count != calls:
            raise ValueError(
                f"calibration: expected {calls} calls of blocks for all inputs, got {count}"
            )

    def _restore(self, replay: Replay) -> None:
        assert self._resume is not None
        done: list[str] = []
        for index in range(replay.calls):
            coded = load_block(self._resume, index)
            self._coded.update(coded)
            done += list(coded)
        self._recipe.restore(replay.recipe, done)

    def _on_call(self, call: Call) -> Any:
        replay = self._replay
        if replay is not None and call.index < replay.calls:
            return self._run_done(call, replay)
        if replay is not None and call.index == replay.calls:
            replay.check(call)
            for index in range(call.index):
                self._emit(index)
        self._chain.enter(call)
        if self._resume is not None and call.index > (0 if replay is None else replay.calls):
            state = {"calls": call.index, "recipe": self._recipe.state()}
            hidden = self._chain.hidden
            tensors = {} if hidden is None else {"hidden": hidden}
            self._resume.save("state", tensors, {**state, "form": self._chain.form})
        coded, output = self._quantize(call)
        if self._resume is not None:
            save_block(self._resume, call.index, coded)
            coded = load_block(self._resume, call.index)  # mapped: memory holds one block
        self._coded.update(coded)
        self._chain.leave(output)
        self._emit(call.index)
        return output

    def _run_done(self, call: Call, replay: Replay) -> Any:
        """What a call that is done returns."""
        output = replay.output(call)
        if output is None:
            with self._job.source.working_copy(call.block, self._dtype) as module:
                if self._recipe.feeds_back:
                    self._write_back(self._trace.layers(replace(call.block, module=module)))
                output = module(*call.args, **call.kwargs)
        self._chain.enter(call)
        self._chain.leave(output)
        return output

    def _write_back(self, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            coded = self._coded.get(name)
            # Layers that nothing reached were rounded after their block had run.
            if coded is not None and not (coded.report.fallback or "").startswith(UNREACHED):
                write_matrix(layer, coded.dequantize())

    def _quantize(self, call: Call) -> tuple[dict[str, CodedLayer], Any]:
        """Quantizes a block's layers as their inputs come by; returns them and the block's output."""
        weights = self._weights(call.block)
        coded: dict[str, CodedLayer] = {}
        with self._job.source.working_copy(call.block, self._dtype) as module:
            layers = self._trace.layers(replace(call.block, module=module))
            if self._recipe.feeds_back:
                self._write_back(layers)

            def quantize(names: list[str], x: Tensor) -> None:
                group = {name: weights[name] for name in names}
                result = self._quantize_group(group, layers, x)
                coded.update(result)
                if self._recipe.feeds_back:
                    for name, layer in result.items():
                        write_matrix(layers[name], layer.quantized.dequantize())

            visitor = _GroupVisitor(set(weights), self._recipe.groups, quantize)
            with input_hooks(layers, visitor.visit):
                output = module(*call.args, **call.kwargs)
            visitor.flush()
        if not self._trial:
            for name in [name for name in weights if name not in coded]:
                if self._trace.last_call[name] == call.index:
                    coded[name] = self._recipe.fall_back(name, weights[name], UNREACHED)
        return {name: coded[name] for name in weights if name in coded}, output

    def _weights(self, block: Block) -> dict[str, Tensor]:
        """The matrices of a block's layers that are still to be compressed, in float32."""
        with self._job.source.weights(block):
            layers = self._trace.layers(block)
            weights = {
                name: matrix_of(layer).float()
                for name, layer in layers.items()
                if name in self._names and name not in self._coded and name not in self._emitted
            }
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"{name}: weight: expected finite values, got NaN or inf")
        return weights

    def _quantize_group(
        self, weights: dict[str, Tensor], layers: dict[str, nn.Module], x: Tensor
    ) -> dict[str, CodedLayer]:
        first = next(iter(weights))
        rows = layer_rows(layers[first], x)
        if rows is None:
            reason = "a convolution over patches that overlap, are padded or of channels in groups"
            return {
                name: self._recipe.fall_back(name, weight, reason)
                for name, weight in weights.items()
                if not self._trial
            }
        statistics = self._recipe.statistics(rows.shape[-1])
        statistics.update(rows)
        if first in self._later:
            statistics.add(self._later[first], self._later_weight)
        if self._trial:
            self._recipe.try_group(weights, statistics)
            return {}
        return self._recipe.quantize_group(weights, statistics)

    def _emit(self, index: int) -> None:
        """Gives away the layers that no later call of a block needs."""
        ready = [name for name in self._coded if self._trace.last_call[name] <= index]
        for name in ready:
            self._give_away(name, self._coded.pop(name))
        label = self._names[ready[0]][0] if ready else self._trace.sequence[index]
        self._job.progress(label, self._share / len(self._trace.sequence))

    def _give_away(self, owner: str, coded: CodedLayer) -> None:
        self._emitted.add(owner)
        for name in sorted(self._names[owner], key=lambda name: name != owner):
            self._job.emit(name, coded)

    def _round_unreached(self) -> None:
        """Layers outside of every block that was called."""
        for owner in [name for name in self._names if name not in self._emitted]:
            block = Block(owner, self._job.model.get_submodule(owner))
            with self._job.source.weights(block):
                weight = matrix_of(block.module).float()
            reason = "no calibration input reached its block"
            self._give_away(owner, self._recipe.fall_back(owner, weight, reason))


class _GroupVisitor:
    """Calls ``quantize`` once for all layers that read the same tensor.

    Where the groups are known, that is before their first layer runs, so that it runs quantized already; else when
    another tensor comes by.
    """

    def __init__(
        self,
        names: set[str],
        known: dict[str, list[str]] | None,
        quantize: Callable[[list[str], Tensor], None],
    ) -> None:
        self._waiting = set(names)
        self._known = known
        self._quantize = quantize
        self._pending: list[str] = []
        self._input: tuple[nn.Module, Tensor] | None = None

    def visit(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Takes a layer that is about to run on ``x``; a second call of the same layer is ignored."""
        if name not in self._waiting:
            return
        last = self._input
        if last is not None and (last[1] is not x or not same_rows(last[0], layer)):
            self.flush()
        members = [name] if self._known is None else self._known.get(name, [name])
        members = [member for member in members if member in self._waiting]
        self._waiting.difference_update(members)
        self._pending += members
        self._input = (layer, x)
        if self._known is not None:
            self.flush()

    def flush(self) -> None:
        """Quantizes what is pending."""
        if self._pending and self._input is not None:
            self._quantize(self._pending, self._input[1])
        self._pending, self._input = [], None
