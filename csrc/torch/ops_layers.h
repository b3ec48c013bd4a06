#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "format/payload.h"
#include "runtime/panel_source.h"

namespace dcext {

// The CPU implementations of the layers' operators; dcext/ops.py documents shapes, dtypes and errors.

at::Tensor linear(const at::Tensor& x, const at::Tensor& payload, const at::Tensor& row_scale,
                  const std::optional<at::Tensor>& col_scale, const std::optional<at::Tensor>& bias,
                  c10::string_view activations);

at::Tensor embedding(const at::Tensor& indices, const at::Tensor& payload,
                     const at::Tensor& row_scale, const std::optional<at::Tensor>& col_scale,
                     int64_t embedding_dim, at::ScalarType dtype);

/** The same from a parsed payload, whose chunks `source` brings unless that is null.
 *  @param place   what messages begin with. */
at::Tensor linear_from(const char* place, const PayloadView& weight, PanelSource* source,
                       const at::Tensor& x, const at::Tensor& row_scale,
                       const std::optional<at::Tensor>& col_scale,
                       const std::optional<at::Tensor>& bias, c10::string_view activations);

at::Tensor embedding_from(const char* place, const PayloadView& weight, PanelSource* source,
                          const at::Tensor& indices, const at::Tensor& row_scale,
                          const std::optional<at::Tensor>& col_scale, int64_t embedding_dim,
                          at::ScalarType dtype);

/** The two halves of `linear` around the integer product, for devices that multiply elsewhere. */
std::tuple<at::Tensor, at::Tensor> quantize_activations(const at::Tensor& x,
                                                        const std::optional<at::Tensor>& col_scale);

at::Tensor dequantize(const at::Tensor& acc, const at::Tensor& row_scale,
                      const at::Tensor& act_scale, const std::optional<at::Tensor>& bias,
                      at::ScalarType dtype);

}  // namespace dcext
