#include "torch/ops_gradient.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "runtime/dequantize.h"
#include "torch/ops_common.h"
#include "torch/torch_executor.h"

namespace dcext {
namespace {

// Weights of a block of the float matrix, 8 MiB: products with it reach the speed of those with the whole.
constexpr int64_t kBlockWeights = int64_t{1} << 21;

void check_in_features(const char* place, const PayloadView& weight, int64_t in_features) {
  TORCH_CHECK_VALUE(in_features == weight.layout().cols, place,
                    ": in_features: expected the payload's ", weight.layout().cols, ", got ",
                    in_features);
}

DequantizeCall dequantize_call(const char* place, const PayloadView& weight, PanelSource* source,
                               const at::Tensor& row_scale,
                               const std::optional<at::Tensor>& col_scale) {
  DequantizeCall call{};
  call.weight = &weight;
  call.source = source;
  call.verify = Verify::kNo;
  call.row_scale = vector_data(place, "row_scale", row_scale, weight.layout().rows, at::kCPU);
  call.col_scale =
      optional_vector_data(place, "col_scale", col_scale, weight.layout().cols, at::kCPU);
  call.isa = selected_isa();
  return call;
}

// Enough panels for all threads and for a block.
int64_t block_panels(const PayloadLayout& layout, const Executor& executor) {
  const int64_t wanted = ceil_div(kBlockWeights, layout.panel_rows * layout.cols);
  return std::min(layout.num_panels(), std::max<int64_t>(wanted, executor.num_workers()));
}

}  // namespace

at::Tensor dequantize_weight(const at::Tensor& payload, const at::Tensor& row_scale,
                             const std::optional<at::Tensor>& col_scale, int64_t in_features,
                             at::ScalarType dtype) {
  constexpr const char* kOp = "dcext::dequantize_weight";
  const PayloadView weight = parse_payload(kOp, payload);
  check_in_features(kOp, weight, in_features);
  DequantizeCall call = dequantize_call(kOp, weight, nullptr, row_scale, col_scale);
  call.verify = Verify::kYes;
  call.type = element_type(kOp, "dtype", dtype);
  call.block_panels = weight.layout().num_panels();
  const at::Tensor out =
      at::empty({weight.layout().rows, in_features}, at::TensorOptions().dtype(dtype));
  call.out = out.mutable_data_ptr();
  TorchExecutor executor;
  raise_if_failed(kOp, run_dequantize(call, executor, [](int64_t, int64_t) {}));
  return out;
}

at::Tensor linear_input_grad(const at::Tensor& grad, const at::Tensor& payload,
                             const at::Tensor& row_scale,
                             const std::optional<at::Tensor>& col_scale, int64_t in_features) {
  constexpr const char* kOp = "dcext::linear_input_grad";
  return linear_input_grad_from(kOp, parse_payload(kOp, payload), nullptr, grad, row_scale,
                                col_scale, in_features);
}

at::Tensor linear_input_grad_from(const char* place, const PayloadView& weight, PanelSource* source,
                                  const at::Tensor& grad, const at::Tensor& row_scale,
                                  const std::optional<at::Tensor>& col_scale, int64_t in_features) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const PayloadLayout& layout = weight.layout();
  element_type(place, "grad", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.dim() >= 1 && grad.size(-1) == layout.rows && grad.is_cpu(), place,
                    ": grad: expected a CPU tensor of shape [..., ", layout.rows, "], got shape ",
                    grad.sizes(), " on ", grad.device());
  check_in_features(place, weight, in_features);
  DequantizeCall call = dequantize_call(place, weight, source, row_scale, col_scale);
  std::vector<int64_t> shape = grad.sizes().vec();
  shape.back() = in_features;
  const at::Tensor tokens = grad.reshape({-1, layout.rows});
  if (tokens.size(0) == 0) return at::empty(shape, grad.options());

  TorchExecutor executor;
  call.type = ElementType::kFloat32;
  call.block_panels = block_panels(layout, executor);
  const at::Tensor block =
      at::empty({std::min(layout.rows, call.block_panels * layout.panel_rows), in_features},
                at::TensorOptions().dtype(at::kFloat));
  call.out = block.mutable_data_ptr();
  at::Tensor sums = at::zeros({tokens.size(0), in_features}, at::TensorOptions().dtype(at::kFloat));
  const auto add_block = [&](int64_t begin, int64_t end) {
    const at::Tensor part = tokens.narrow(1, begin, end - begin).to(at::kFloat);
    at::addmm_out(sums, sums, part, block.narrow(0, 0, end - begin));
  };
  raise_if_failed(place, run_dequantize(call, executor, add_block));
  return sums.to(grad.scalar_type()).reshape(shape);
}

}  // namespace dcext
