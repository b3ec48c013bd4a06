"""Recipe ``rate`` for packed payloads: tables, widths and scales that lose least at a given stored size.

A packed panel has one width and one table of ``2^width`` integers for all its weights, so a code costs the same whatever
it stands for. Then scales follow how wide rows and columns spread, for one table serves values of one spread best
(steps follow the square root where an entropy code takes its share, see ``rate.spread_factor``), tables are those of
Lloyd and Max, and what an error matters decides the width: every panel takes the width, and the limit beyond which
weights become exceptions, where ``error + price * bits`` is least.

Everything is computed from histograms of the weights in units of the integers' grid, with a bin for each half of a
step, since all thresholds between integers are multiples of 1/2.

Source: Max, "Quantizing for minimum distortion", 1960; Lloyd, "Least squares quantization in PCM", 1982; allocation at
equal slope by Shoham and Gersho, 1988.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dcext.quantize.control import RateCurve
from dcext.quantize.feedback import BIT_PRICE, MAX_LEVEL, round_with_feedback
from dcext.quantize.output_moment import row_factor
from dcext.quantize.quantized import QuantizedWeight, to_bfloat16_values
from dcext.quantize.rate import (
    HEADROOM,
    OUTLIER_STEPS,
    Scales,
    WeightSample,
    fit_scales,
)
from dcext.quantize.refine import refine

WIDTHS = (2, 3, 4, 5, 6)  # bits of a code
LIMITS = (2.8, 3.2, 3.6, 4.2, math.inf)  # root mean squares beyond which weights are exceptions
PANEL_WEIGHTS = 1 << 17
BLOCK_ROWS = 16
LEAST_PACKED_BITS, MOST_PACKED_BITS = 2.1, 6.0  # stored; targets beyond these are refused
CHUNK_BITS = 8 * (32 + 64 + 32)  # table entry, table of values, mean padding
EXCEPTION_BITS = 24
EXCEPTION_ROW_BITS = 16  # of every row, in a panel that has any
EXCEPTION_TIME_BITS = 40  # what an exception's time is worth in bits, as the encoder has it
BINS = 512  # halves of steps, from -128 to 128
LLOYD_STEPS = 30
# 1 to 4 lower the error by 4.0, 5.3, 6.0 and 6.5 %, each in the time of the rounding.
REFINING_SWEEPS = 2
FILL_RANGE, FILL_HALVINGS = (
    2.0**12,
    32,
)  # of a bit's price, when a model's last layers meet its size
SMOOTHED_BINS = 17  # about half a root mean square
LEAST_STEP = 1e-30  # of columns kept outside: whatever they are rounded to is as good as zero
# Largest weight, in root mean squares of its column, that the grid is made to hold; columns beyond it get coarser.
MOST_MAGNITUDE = 16.0
GRID_LOG2 = tuple(k / 16 for k in range(-160, 81))  # scales over a layer's rms, as in control
CENTERS = (torch.arange(BINS, dtype=torch.float64) - BINS // 2) / 2 + 0.25


def panel_rows(rows: int, cols: int) -> int:
    """Rows of the panels that the encoder cuts a matrix into (``plan_layout`` in csrc/codec/payload_encoder.cpp)."""
    most = min(max(PANEL_WEIGHTS // cols, BLOCK_ROWS), rows)
    panels = -(-rows // most)
    blocks = -(-rows // (panels * BLOCK_ROWS))
    return min(blocks * BLOCK_ROWS, rows)


@dataclass
class Histogram:
    """Weights of panels by the half of a step in which they lie.

    Attributes:
        count: ``(panels, BINS)`` float64, how many.
        energy: ``(panels, BINS)`` float64, what a squared error of one step of each adds to the loss, summed.
        spread: ``(panels,)`` float64, root mean square in steps: the unit of ``LIMITS``.
        rows: ``(panels,)`` float64, rows of each panel.
    """

    count: Tensor
    energy: Tensor
    spread: Tensor
    rows: Tensor

    def __add__(self, other: Histogram) -> Histogram:
        """The panels of both."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Histogram(*(torch.cat(pair) for pair in pairs))


def histogram(values: Tensor, by_row: Tensor, by_col: Tensor, spread: float) -> Histogram:
    """That of one panel.

    Args:
        values: ``(N, K)`` float32, in steps.
        by_row: ``(N,)`` or ``(N, 1)``, with ``by_col`` the weight of each squared error: their product.
        by_col: ``(K,)``.
        spread: root mean square of the values.
    """
    index = (2 * values).floor_().clamp_(-BINS // 2, BINS // 2 - 1).to(torch.int64) + BINS // 2
    energy = (by_row.reshape(-1, 1) * by_col).double().expand_as(values).flatten()
    flat = index.flatten()
    return Histogram(
        torch.bincount(flat, minlength=BINS).double()[None],
        torch.bincount(flat, energy, minlength=BINS)[None],
        torch.tensor([spread], dtype=torch.float64),
        torch.tensor([len(values)], dtype=torch.float64),
    )


@dataclass
class Options:
    """What each panel may become: widths by limits.

    Attributes:
        width: ``(options,)`` int64.
        error: ``(panels, options)`` float64, what rounding adds to the loss (twice it), without feedback.
        exceptions: ``(panels, options)`` float64, how many.
        stored_bits: ``(panels, options)`` float64, of codes and exceptions.
        nearest: ``(panels, options, BINS)`` int8, tables for the operator ``round_columns_``.
    """

    width: Tensor
    error: Tensor
    exceptions: Tensor
    stored_bits: Tensor
    nearest: Tensor

    def choose(self, price: float) -> Tensor:
        """``(panels,)`` int64: the option of least ``error + price * bits``, time of exceptions counted as bits."""
        bits = self.stored_bits + EXCEPTION_TIME_BITS * self.exceptions
        return (self.error + price * bits).argmin(1)


def fit_options(panels: Histogram) -> Options:
    """Lloyd-Max tables of every width and limit for every panel."""
    limits = torch.tensor(LIMITS, dtype=torch.float64) * panels.spread[:, None]
    total = panels.count.sum(1)
    fitted = []
    for width in WIDTHS:
        levels = distinct(lloyd_levels(panels.energy, limits, 2**width))
        nearest, exceptional = nearest_table(levels, limits)
        error = (panels.energy[:, None] * (CENTERS - nearest).square()).sum(2)
        exceptions = (panels.count[:, None] * exceptional).sum(2)
        rows = (exceptions > 0) * panels.rows[:, None]
        bits = width * total[:, None] + EXCEPTION_BITS * exceptions + EXCEPTION_ROW_BITS * rows
        fitted.append((error, exceptions, bits, nearest.to(torch.int8)))
    columns = [torch.cat(column, 1) for column in zip(*fitted, strict=True)]
    return Options(torch.tensor(WIDTHS).repeat_interleave(len(LIMITS)), *columns)


def lloyd_levels(energy: Tensor, limits: Tensor, count: int) -> Tensor:
    """Levels of least ``sum energy * (center - level)^2`` over the bins within a limit, by Lloyd's iteration.

    It starts at equal parts of the integral of the cube root of the density, which is best for many levels (Panter and
    Dite, 1951).

    Args:
        energy: ``(panels, BINS)`` float64.
        limits: ``(panels, limits)`` float64, in steps.
        count: of levels.

    Returns:
        ``(panels, limits, count)`` float64, ascending.
    """
    inside = energy[:, None] * (CENTERS.abs() <= limits[:, :, None])
    mass, moment = _integral(inside), _integral(inside * CENTERS)
    levels = _companded(inside, count)
    for _ in range(LLOYD_STEPS):
        # A bin goes to the upper level where its center is above the middle of both.
        edges = (levels[..., 1:] + levels[..., :-1] + (BINS // 2 - 0.5)).ceil()
        edges = edges.clamp_(0, BINS).long()
        first = torch.zeros_like(edges[..., :1])
        cells = torch.cat([first, edges, first + BINS], -1)
        in_cell = mass.gather(-1, cells).diff(dim=-1)
        centroid = moment.gather(-1, cells).diff(dim=-1) / in_cell
        levels = torch.where(in_cell > 0, centroid, levels)
    return levels


def _integral(bins: Tensor) -> Tensor:
    return torch.nn.functional.pad(bins.cumsum(-1), (1, 0))


def _companded(inside: Tensor, count: int) -> Tensor:
    smooth = torch.nn.functional.avg_pool1d(inside, SMOOTHED_BINS, 1, SMOOTHED_BINS // 2)
    root = smooth.clamp_min(1e-300).pow(1 / 3) * (inside > 0) + 1e-60
    share = root.cumsum(-1) / root.sum(-1, keepdim=True)
    at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    index = torch.searchsorted(share, at.expand(*share.shape[:-1], -1).contiguous())
    return CENTERS[index.clamp_(max=BINS - 1)]


def distinct(levels: Tensor) -> Tensor:
    """Integers close to ascending levels, none twice, within those of int8 but -128.

    Args:
        levels: ``(..., n)`` float64, ascending.
    """
    count = levels.shape[-1]
    index = torch.arange(count, dtype=torch.float64)
    offset = levels.round() - index
    up = offset.cummax(-1)[0]
    down = offset.flip(-1).cummin(-1)[0].flip(-1)
    middle = ((up + down) / 2).floor()
    return middle.clamp(-MAX_LEVEL, MAX_LEVEL + 1 - count) + index


def nearest_table(levels: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """What every bin is rounded to: the nearest level, or beyond the limit the nearest integer.

    Args:
        levels: ``(panels, limits, n)`` float64, ascending integers.
        limits: ``(panels, limits)`` float64, in steps.

    Returns:
        ``(panels, limits, BINS)``: float64 integers, and whether they are exceptions.
    """
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    centers = CENTERS.expand(*limits.shape, -1).contiguous()
    at_level = levels.gather(-1, torch.searchsorted(middles, centers))
    integers = CENTERS.round().clamp(-MAX_LEVEL, MAX_LEVEL)
    beyond = CENTERS.abs() > limits[:, :, None]
    nearest = torch.where(beyond, integers, at_level)
    return nearest, beyond & (at_level != integers)


@dataclass
class PackedForecast:
    """What is known of a packed layer before it is rounded.

    Attributes:
        sample: some of its weights.
        row_scale: ``(N,)`` from ``output_moment.row_scales``.
        overhead_bits: bits per weight that do not depend on the scale.
    """

    sample: WeightSample
    row_scale: Tensor
    overhead_bits: float

    def curve(self) -> RateCurve:
        """Bits of panels that are like the sample but for their energy, at the points of ``GRID_LOG2``.

        The points are relative to the root mean square that weights have in steps of ``scale = 1``.
        """
        sample, (rows, cols) = self.sample, self.sample.shape
        height = panel_rows(rows, cols)
        energy = (sample.row_spread / self.row_scale).double().square()
        by_panel = torch.stack([part.sum() for part in energy.split(height)]) * cols
        heights = torch.tensor([len(part) for part in energy.split(height)], dtype=torch.float64)
        values = sample.units * (HEADROOM / sample.units.abs().max().clamp_min(1e-30))
        worth = energy[sample.rows.long()] * sample.col_spread.square()
        spread = float((values.square() * worth).sum() / worth.sum().clamp_min(1e-30)) ** 0.5
        options = fit_options(histogram(values[:, None], worth, torch.ones(1), spread))
        share = options.error[0] / (values.square() * worth).sum().clamp_min(1e-30)
        exceptions = options.exceptions[0] / len(values)
        panel_bits = options.width + EXCEPTION_BITS * exceptions
        stored = heights[:, None] * (cols * panel_bits + EXCEPTION_ROW_BITS * (exceptions > 0))
        layer = Options(
            options.width,
            by_panel[:, None] * share,
            heights[:, None] * cols * exceptions,
            stored,
            options.nearest,
        )
        rms = float(energy.mean().sqrt()) or 1.0
        bits = []
        for point in GRID_LOG2:
            chosen = layer.choose(BIT_PRICE * (rms * 2.0**point) ** 2)
            bits.append(float(stored.gather(1, chosen[:, None]).sum()) / (rows * cols))
        return RateCurve(
            math.log2(rms), GRID_LOG2, torch.tensor(bits).double(), rows * cols, self.overhead_bits
        )


@dataclass
class PackedPlan(Scales):
    """Scales, and the tables that weights are rounded to for packed payloads.

    Attributes:
        options: by layer, what its panels may become.
        price: of a bit, by which they are chosen.
    """

    options: dict[str, Options]
    price: float

    def nearest(self, name: str) -> Tensor:
        """What each half of a step of a layer is rounded to: ``(panels, BINS)`` int8."""
        options = self.options[name]
        chosen = options.choose(self.price)
        return options.nearest[torch.arange(len(chosen)), chosen]

    def fill(self, left_bits: float) -> None:
        """Sets the price with which codes, exceptions and outlier columns come nearest to a size."""
        low, high = self.price / FILL_RANGE, self.price * FILL_RANGE  # too many bits, too few
        for _ in range(FILL_HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._bits(middle) > left_bits else (low, middle)
        self.price = min((low, high), key=lambda price: abs(self._bits(price) - left_bits))

    def _bits(self, price: float) -> float:
        bits = 0.0
        for name, options in self.options.items():
            bits += float(options.stored_bits.gather(1, options.choose(price)[:, None]).sum())
            bits += len(self.outliers[name]) * (32 + 16 * len(self.row_scale[name]))
        return bits


def plan_packed(
    weights: dict[str, Tensor], factor: Tensor, rows: dict[str, Tensor], scale: float
) -> PackedPlan:
    """Scales and tables of a group; arguments as of ``rate.plan_steps``, whose ``scale`` stands for a bit's price.

    The price is what a bit is worth to an entropy-coded layer with these steps, ``BIT_PRICE * scale^2``.
    """
    pivots = factor.diagonal().float()
    spreads = {name: row_spread(weight * pivots) for name, weight in weights.items()}
    units = {name: weight * pivots / spreads[name][:, None] for name, weight in weights.items()}
    total = torch.stack([unit.square().sum(0) for unit in units.values()]).sum(0)
    count = sum(len(unit) for unit in units.values())
    by_col = _positive((total / count).sqrt())
    least = {name: unit.abs().amax(0) / by_col / MOST_MAGNITUDE for name, unit in units.items()}
    outliers = {
        name: (value > OUTLIER_STEPS).nonzero()[:, 0].int() for name, value in least.items()
    }
    held = [value.masked_fill(value > OUTLIER_STEPS, 0) for value in least.values()]
    grown = torch.stack(held).amax(0).clamp_min(1)
    col_scale = to_bfloat16_values(by_col * grown / pivots)
    plan = PackedPlan({}, col_scale, outliers, {}, BIT_PRICE * scale**2)
    for name, weight in weights.items():
        inside = weight.index_fill(1, outliers[name].long(), 0)
        plan.row_scale[name] = fit_grid(inside, spreads[name], col_scale)
        panels = panel_histograms(inside, plan.row_scale[name], col_scale, rows[name], pivots)
        plan.options[name] = fit_options(panels)
    return plan


def row_spread(scaled: Tensor) -> Tensor:
    """Root mean squares of rows, ``(N,)``; that of all of them for rows of zeros."""
    return _positive(scaled.square().mean(1).sqrt())


def _positive(values: Tensor) -> Tensor:
    mean = values.mean()
    return torch.where(values > 0, values, mean if mean > 0 else torch.ones_like(mean))


def fit_grid(weight: Tensor, spread: Tensor, col_scale: Tensor) -> Tensor:
    """Row scales in proportion to the rows' spread, as small as the largest weight of each panel allows.

    Args:
        weight: ``(N, K)``.
        spread: ``(N,)``.
        col_scale: ``(K,)``.

    Returns:
        ``(N,)`` float32, values that bfloat16 holds.
    """
    largest = (weight.abs() / col_scale).amax(1) / spread
    height = panel_rows(*weight.shape)
    by_panel = torch.cat([part.max().expand_as(part) for part in largest.split(height)])
    return to_bfloat16_values(spread * _positive(by_panel) / HEADROOM)


def panel_histograms(
    weight: Tensor, row_scale: Tensor, col_scale: Tensor, rows: Tensor, pivots: Tensor
) -> Histogram:
    """Histograms of the panels of a layer, in steps of ``row_scale * col_scale``."""
    by_row, by_col = (row_scale / rows).square(), (col_scale * pivots).square()
    height = panel_rows(*weight.shape)
    parts = []
    for part, scale, worth in zip(
        weight.split(height), row_scale.split(height), by_row.split(height), strict=True
    ):
        values = part / scale[:, None] / col_scale
        spread = float(((values.square() @ by_col) / by_col.sum()).mean().sqrt())
        parts.append(histogram(values, worth, by_col, spread))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def round_packed(
    name: str, weight: Tensor, factor: Tensor, plan: PackedPlan, moment: Tensor
) -> QuantizedWeight:
    """Rounds one layer to its tables with error feedback, then fits its row scales; as ``rate.round_to_steps``."""
    row_scale, col_scale = plan.row_scale[name], plan.col_scale
    outliers = plan.outliers[name].long()
    inside = weight.index_fill(1, outliers, 0)
    taken = col_scale.index_fill(0, outliers, LEAST_STEP)
    by_row = row_factor(moment, weight.shape[0])
    tables, height = plan.nearest(name), panel_rows(*weight.shape)
    qweight = round_with_feedback(
        inside, factor, row_scale, taken, None, by_row, nearest=tables, panel_rows=height
    )
    qweight = refine(
        inside, qweight, factor, by_row, row_scale, taken, tables, height, REFINING_SWEEPS
    )
    qweight[:, outliers] = 0
    return fit_scales(name, weight, qweight, factor, plan, by_row)
