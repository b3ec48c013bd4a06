#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/decode_indexed.h"
#include "cuda/dequantize_epilogue.h"
#include "cuda/quantize_activations.h"
#include "torch/ops_common.h"
#include "torch/ops_device_stream.h"
#include "torch/ops_seek.h"

namespace dcext {
namespace {

void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op, ": expected the kernel to launch, got ",
              cudaGetErrorName(error), " (", cudaGetErrorString(error), ")");
}

std::tuple<at::Tensor, at::Tensor> quantize_activations(
    const at::Tensor& x, const std::optional<at::Tensor>& col_scale) {
  constexpr const char* kOp = "dcext::quantize_activations";
  const ElementType type = element_type(kOp, "x", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, kOp,
                    ": x: expected shape [..., in_features] with in_features >= 1, got ",
                    x.sizes());
  const int64_t cols = x.size(-1);
  const float* scale_data = optional_vector_data(kOp, "col_scale", col_scale, cols, x.device());
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor input = x.contiguous();
  const at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const at::Tensor act_scale =
      at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  check_launch(kOp, launch_quantize_activations(
                        input.const_data_ptr(), type, scale_data, input.numel() / cols, cols,
                        q.mutable_data_ptr<int8_t>(), act_scale.mutable_data_ptr<float>(),
                        c10::cuda::getCurrentCUDAStream()));
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
  const at::Device device = acc.device();
  const int64_t rows = acc.size(-1);
  const at::IntArrayRef token_shape = acc.sizes().slice(0, acc.dim() - 1);
  TORCH_CHECK_TYPE(act_scale.scalar_type() == at::kFloat, kOp,
                   ": act_scale: expected torch.float32, got ", act_scale.scalar_type());
  TORCH_CHECK_VALUE(act_scale.sizes() == token_shape && act_scale.device() == device, kOp,
                    ": act_scale: expected shape ", token_shape, " on ", device, ", got ",
                    act_scale.sizes(), " on ", act_scale.device());
  const float* row_scale_data = vector_data(kOp, "row_scale", row_scale, rows, device);
  const float* bias_data = optional_vector_data(kOp, "bias", bias, rows, device);
  const c10::cuda::CUDAGuard guard(device);
  const at::Tensor sums = acc.contiguous();
  const at::Tensor token_scales = act_scale.contiguous();
  const at::Tensor y = at::empty(acc.sizes(), acc.options().dtype(dtype));
  check_launch(kOp, launch_dequantize_epilogue(sums.const_data_ptr<int32_t>(), row_scale_data,
                                               token_scales.const_data_ptr<float>(), bias_data,
                                               sums.numel() / rows, rows, y.mutable_data_ptr(),
                                               type, c10::cuda::getCurrentCUDAStream()));
  return y;
}

void decode_indexed(at::TensorList payloads, at::TensorList indices, at::TensorList outs,
                    at::Tensor failures) {
  check_indexed(payloads, indices, outs, failures);
  const c10::cuda::CUDAGuard guard(failures.device());
  std::vector<DecodeJob> jobs;
  jobs.reserve(payloads.size());
  for (size_t i = 0; i < payloads.size(); ++i) {
    const auto* blocks = reinterpret_cast<const SeekBlock*>(indices[i].const_data_ptr<uint8_t>());
    jobs.push_back({decode_target(payloads[i], outs[i]), blocks, indices[i].size(0)});
  }
  check_launch("dcext::decode_indexed_",
               launch_decode_indexed(jobs.data(), static_cast<int64_t>(jobs.size()),
                                     failures.mutable_data_ptr<int32_t>(),
                                     c10::cuda::getCurrentCUDAStream()));
}

void fetch_cuda(int64_t stream, int64_t unit, at::Tensor slot) {
  fetch(stream, unit, slot, current_cuda_stream(slot.device()));
}

void fetched_cuda(int64_t stream, int64_t unit, at::Tensor slot,
                  const std::optional<at::Tensor>& after) {
  fetched(stream, unit, slot, current_cuda_stream(slot.device()));
}

}  // namespace

Link::Stream current_cuda_stream(at::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

}  // namespace dcext

// The schemas are defined in ops.cpp.
TORCH_LIBRARY_IMPL(dcext, CUDA, m) {
  m.impl("decode_indexed_", &dcext::decode_indexed);
  m.impl("fetch_", &dcext::fetch_cuda);
  m.impl("fetched_", &dcext::fetched_cuda);
  m.impl("quantize_activations", &dcext::quantize_activations);
  m.impl("dequantize", &dcext::dequantize);
}
