#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace dcext {

// The CPU implementations of the layers' operators; dcext/ops.py documents shapes, dtypes and errors.

at::Tensor linear(const at::Tensor& x, const at::Tensor& payload, const at::Tensor& row_scale,
                  const std::optional<at::Tensor>& col_scale, const std::optional<at::Tensor>& bias,
                  c10::string_view activations);

at::Tensor embedding(const at::Tensor& indices, const at::Tensor& payload,
                     const at::Tensor& row_scale, const std::optional<at::Tensor>& col_scale,
                     int64_t embedding_dim, at::ScalarType dtype);

}  // namespace dcext
