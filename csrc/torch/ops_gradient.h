#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "format/payload.h"
#include "runtime/panel_source.h"

namespace dcext {

// The CPU implementations of the operators that make a layer's float matrix, or parts of it; dcext/ops.py documents
// shapes, dtypes and errors.

at::Tensor dequantize_weight(const at::Tensor& payload, const at::Tensor& row_scale,
                             const std::optional<at::Tensor>& col_scale, int64_t in_features,
                             at::ScalarType dtype);

at::Tensor linear_input_grad(const at::Tensor& grad, const at::Tensor& payload,
                             const at::Tensor& row_scale,
                             const std::optional<at::Tensor>& col_scale, int64_t in_features);

/** The same from a parsed payload, whose chunks `source` brings unless that is null.
 *  @param place   what messages begin with. */
at::Tensor linear_input_grad_from(const char* place, const PayloadView& weight, PanelSource* source,
                                  const at::Tensor& grad, const at::Tensor& row_scale,
                                  const std::optional<at::Tensor>& col_scale, int64_t in_features);

}  // namespace dcext
