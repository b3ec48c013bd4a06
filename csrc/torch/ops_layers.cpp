#include "torch/ops_layers.h"

#include <ATen/ops/empty.h>

#include "runtime/layers.h"
#include "torch/ops_common.h"
#include "torch/torch_executor.h"

namespace dcext {
namespace {

Activations parse_activations(const char* place, c10::string_view name) {
  TORCH_CHECK_VALUE(name == "int8" || name == "none", place,
                    ": activations: expected 'int8' or 'none', got '", name, "'");
  return name == "int8" ? Activations::kInt8 : Activations::kNone;
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& payload, const at::Tensor& row_scale,
                  const std::optional<at::Tensor>& col_scale, const std::optional<at::Tensor>& bias,
                  c10::string_view activations) {
  constexpr const char* kOp = "dcext::linear";
  return linear_from(kOp, parse_payload(kOp, payload), nullptr, x, row_scale, col_scale, bias,
                     activations);
}

at::Tensor linear_from(const char* place, const PayloadView& weight, PanelSource* source,
                       const at::Tensor& x, const at::Tensor& row_scale,
                       const std::optional<at::Tensor>& col_scale,
                       const std::optional<at::Tensor>& bias, c10::string_view activations) {
  const int64_t rows = weight.layout().rows, cols = weight.layout().cols;
  const ElementType type = element_type(place, "x", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == cols && x.is_cpu(), place,
                    ": x: expected a CPU tensor of shape [..., ", cols, "], got shape ", x.sizes(),
                    " on ", x.device());
  const at::Tensor input = x.contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = rows;
  at::Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  LinearCall call{};
  call.weight = &weight;
  call.source = source;
  call.row_scale = vector_data(place, "row_scale", row_scale, rows, at::kCPU);
  call.col_scale = optional_vector_data(place, "col_scale", col_scale, cols, at::kCPU);
  call.bias = optional_vector_data(place, "bias", bias, rows, at::kCPU);
  call.x = input.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.type = type;
  call.tokens = input.numel() / cols;
  call.activations = parse_activations(place, activations);
  TORCH_CHECK_VALUE(call.activations == Activations::kNone || cols <= kMaxInt8Cols, place,
                    ": payload: expected at most ", kMaxInt8Cols,
                    " columns with activations='int8', got ", cols);
  call.isa = selected_isa();
  TorchExecutor executor;
  raise_if_failed(place, run_linear(call, executor));
  return y;
}

at::Tensor embedding(const at::Tensor& indices, const at::Tensor& payload,
                     const at::Tensor& row_scale, const std::optional<at::Tensor>& col_scale,
                     int64_t embedding_dim, at::ScalarType dtype) {
  constexpr const char* kOp = "dcext::embedding";
  return embedding_from(kOp, parse_payload(kOp, payload), nullptr, indices, row_scale, col_scale,
                        embedding_dim, dtype);
}

at::Tensor embedding_from(const char* place, const PayloadView& weight, PanelSource* source,
                          const at::Tensor& indices, const at::Tensor& row_scale,
                          const std::optional<at::Tensor>& col_scale, int64_t embedding_dim,
                          at::ScalarType dtype) {
  const int64_t rows = weight.layout().rows, cols = weight.layout().cols;
  TORCH_CHECK_VALUE(embedding_dim == cols, place, ": embedding_dim: expected the payload's ", cols,
                    ", got ", embedding_dim);
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt, place,
                   ": indices: expected torch.int64 or torch.int32, got ", indices.scalar_type());
  TORCH_CHECK_VALUE(indices.is_cpu(), place, ": indices: expected a CPU tensor, got one on ",
                    indices.device());
  const ElementType type = element_type(place, "dtype", dtype);
  const at::Tensor flat = indices.to(at::kLong).contiguous();
  const int64_t* data = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    TORCH_CHECK_INDEX(0 <= data[i] && data[i] < rows, place, ": indices: expected values in [0, ",
                      rows, "), got ", data[i]);
  }
  std::vector<int64_t> shape = indices.sizes().vec();
  shape.push_back(cols);
  at::Tensor out = at::empty(shape, at::TensorOptions().dtype(dtype));
  if (out.numel() == 0) return out;
  EmbeddingCall call{};
  call.weight = &weight;
  call.source = source;
  call.row_scale = vector_data(place, "row_scale", row_scale, rows, at::kCPU);
  call.col_scale = optional_vector_data(place, "col_scale", col_scale, cols, at::kCPU);
  call.indices = data;
  call.count = flat.numel();
  call.out = out.mutable_data_ptr();
  call.type = type;
  call.isa = selected_isa();
  TorchExecutor executor;
  raise_if_failed(place, run_embedding(call, executor));
  return out;
}

std::tuple<at::Tensor, at::Tensor> quantize_activations(
    const at::Tensor& x, const std::optional<at::Tensor>& col_scale) {
  constexpr const char* kOp = "dcext::quantize_activations";
  const ElementType type = element_type(kOp, "x", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, kOp,
                    ": x: expected shape [..., in_features] with in_features >= 1, got ",
                    x.sizes());
  const int64_t cols = x.size(-1), tokens = x.numel() / cols;
  const float* scale_data = optional_vector_data(kOp, "col_scale", col_scale, cols, at::kCPU);
  const at::Tensor input = x.contiguous();
  const at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const at::Tensor act_scale =
      at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  const GemmKernels& kernels = gemm_kernels(selected_isa(), 1);
  const auto* src = static_cast<const uint8_t*>(input.const_data_ptr());
  auto* dst = q.mutable_data_ptr<int8_t>();
  auto* scales = act_scale.mutable_data_ptr<float>();
  TorchExecutor executor;
  executor.run(tokens, [&](int64_t m, int) {
    kernels.quantize(src + m * cols * element_nbytes(type), type, scale_data, cols, dst + m * cols,
                     scales + m);
  });
  return {q, act_scale};
}

at::Tensor dequantize(const at::Tensor& acc, const at::Tensor& row_scale,
                      const at::Tensor& act_scale, const std::optional<at::Tensor>& bias,
                      at::ScalarType dtype) {
  constexpr const char* kOp = "dcext::dequantize";
  const ElementType type = element_type(kOp, "dtype", dtype);
  TORCH_CHECK_TYPE(acc.scalar_type() == at::kInt, kOp, ": acc: expected torch.int32, got ",
                   acc.scalar_type());
  TORCH_CHECK_VALUE(acc.dim() >= 1 && acc.size(-1) >= 1, kOp,
                    ": acc: expected shape [..., out_features] with out_features >= 1, got ",
                    acc.sizes());
  const int64_t rows = acc.size(-1), tokens = acc.numel() / rows;
  TORCH_CHECK_VALUE(act_scale.sizes() == acc.sizes().slice(0, acc.dim() - 1), kOp,
                    ": act_scale: expected shape ", acc.sizes().slice(0, acc.dim() - 1), ", got ",
                    act_scale.sizes());
  const at::Tensor sums = acc.contiguous();
  const at::Tensor token_scales = act_scale.reshape({tokens}).contiguous();
  const at::Tensor y = at::empty(acc.sizes(), acc.options().dtype(dtype));
  const PanelOutput output{vector_data(kOp, "row_scale", row_scale, rows, at::kCPU),
                           optional_vector_data(kOp, "bias", bias, rows, at::kCPU),
                           y.mutable_data_ptr(), rows, type};
  gemm_kernels(selected_isa(), 1)
      .dequantize(sums.const_data_ptr<int32_t>(), tokens, rows,
                  vector_data(kOp, "act_scale", token_scales, tokens, at::kCPU), output);
  return y;
}

}  // namespace dcext
