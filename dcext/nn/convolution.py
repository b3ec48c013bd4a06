"""Convolutions whose INT8 weights are stored compressed."""

from __future__ import annotations

import torch
from torch import Tensor

from dcext.nn.compressed import CompressedModule
from dcext.nn.matrix import as_patches


class DCConvolution(CompressedModule):
    """What a frozen convolution of torch is mixed with: its matrix is ``(out_channels, in_channels / groups * kernel)``.

    Convolutions of kernel size 1, or over patches side by side, are linear layers and multiplied as such, with float
    activations. All others decode their whole weight for each call, and convolve in float.
    """

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """Applies the layer.

        Args:
            x: ``(batch, channels, *sizes)`` or ``(channels, *sizes)``.
            args: of a transposed convolution: the size of the output.
        """
        patches = as_patches(self, x) if self.backing is None and x.device.type == "cpu" else None
        if patches is None:
            return super().forward(x, *args)
        bias = self._parameters["bias"]
        y = torch.ops.dcext.linear(
            patches,
            self.payload,
            self.row_scale,
            self.col_scale,
            None if bias is None else bias.float(),
            self.activations,
        )
        begin = x.dim() - len(self.kernel_size)  # type: ignore[arg-type]
        return y.movedim(-1, begin - 1)

    def extra_repr(self) -> str:
        """As the float convolution's, then how the weights are stored."""
        return f"{super(CompressedModule, self).extra_repr()}, {super().extra_repr()}"
