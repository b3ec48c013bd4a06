#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace dcext {

/** The operator `round_columns_`; dcext/ops.py documents shapes, dtypes and errors. */
void round_columns_op(const at::Tensor& weight, at::Tensor target, const at::Tensor& feedback,
                      const at::Tensor& step, const at::Tensor& pull, at::Tensor q,
                      at::Tensor error, const std::optional<at::Tensor>& row_feedback,
                      const std::optional<at::Tensor>& nearest, int64_t panel_rows);

}  // namespace dcext
