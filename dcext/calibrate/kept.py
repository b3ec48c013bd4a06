"""Steps of a compression as tensors and JSON, for ``ResumeFolder``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dcext.calibrate.coded import CodedLayer
from dcext.calibrate.resume import ResumeFolder
from dcext.calibrate.sensitivity import Sensitivity
from dcext.quantize.quantized import QuantizedWeight
from dcext.quantize.rate import WeightSample
from dcext.quantize.report import LayerReport


def pack_sensitivity(value: Sensitivity) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors and the rest of it."""
    tensors = {f"output/{name}": tensor for name, tensor in value.output.items()}
    for name, sample in value.samples.items():
        tensors[f"values/{name}"] = sample.values
        tensors[f"rows/{name}"] = sample.rows
        tensors[f"spread/{name}"] = sample.row_spread
        tensors[f"units/{name}"] = sample.units
        tensors[f"col_spread/{name}"] = sample.col_spread
    shapes = {name: sample.shape for name, sample in value.samples.items()}
    return tensors, {"groups": value.groups, "shapes": shapes}


def unpack_sensitivity(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Sensitivity:
    """The inverse of ``pack_sensitivity``."""
    output = {
        name.removeprefix("output/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("output/")
    }
    samples = {
        name: WeightSample(
            tensors[f"values/{name}"],
            tensors[f"rows/{name}"],
            tensors[f"spread/{name}"],
            tensors[f"units/{name}"],
            tensors[f"col_spread/{name}"],
            tuple(shape),
        )
        for name, shape in meta["shapes"].items()
    }
    return Sensitivity(output, meta["groups"], samples)


def save_block(resume: ResumeFolder, index: int, coded: dict[str, CodedLayer]) -> None:
    """Keeps the layers that a call of a block gave."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, layer in coded.items():
        quantized = layer.quantized
        tensors[f"{name}/payload"] = layer.payload
        for leaf in ("row_scale", "col_scale", "outlier_index", "outlier_weight"):
            tensor = getattr(quantized, leaf)
            if tensor is None:
                continue
            owner = owners.setdefault(id(tensor), name)
            if owner == name:
                tensors[f"{name}/{leaf}"] = tensor
            else:
                shared[name] = owner  # only col_scale is ever shared
    reports = [asdict(layer.report) for layer in coded.values()]
    resume.save(f"block-{index:05d}", tensors, {"reports": reports, "shared": shared})


def load_block(resume: ResumeFolder, index: int) -> dict[str, CodedLayer]:
    """The layers of a call, mapped from the file.

    Raises:
        FileNotFoundError: they were not kept.
    """
    loaded = resume.load(f"block-{index:05d}")
    if loaded is None:
        raise FileNotFoundError(f"{resume.path}: expected block {index}, found none")
    tensors, meta = loaded
    coded = {}
    for row in meta["reports"]:
        report = LayerReport(**{**row, "shape": tuple(row["shape"])})
        name = report.name
        owner = meta["shared"].get(name, name)
        quantized = QuantizedWeight(
            torch.empty(0, dtype=torch.int8),
            tensors[f"{name}/row_scale"],
            tensors.get(f"{owner}/col_scale"),
            tensors.get(f"{name}/outlier_index"),
            tensors.get(f"{name}/outlier_weight"),
            report.fallback,
        )
        coded[name] = CodedLayer(tensors[f"{name}/payload"], quantized, report)
    return coded
