#include "torch/ops_seek.h"

#include <ATen/ops/empty.h>

#include <atomic>

#include "codec/seek_index.h"
#include "runtime/thread_pool.h"
#include "torch/ops_common.h"
#include "torch/torch_executor.h"

namespace dcext {

std::optional<at::Tensor> seek_index(const at::Tensor& payload, Verify verify) {
  constexpr const char* kOp = "dcext.seek_index";
  const PayloadView view = parse_payload(kOp, payload);
  TORCH_CHECK_VALUE(view.layout().codec != Codec::kPacked, kOp,
                    ": payload: expected codec raw or zstd, got packed, which is not decoded");
  PoolExecutor executor(default_pool(), default_pool().num_threads());
  at::Tensor index;
  bool inside = false;
  const auto allocate = [&](int64_t num_blocks) {
    index = at::empty({num_blocks, int64_t{sizeof(SeekBlock)}}, at::kByte);
    return reinterpret_cast<SeekBlock*>(index.mutable_data_ptr<uint8_t>());
  };
  raise_if_failed(kOp, build_seek_index(view, verify, executor, allocate, &inside));
  if (!inside) return std::nullopt;
  return index;
}

void check_indexed(at::TensorList payloads, at::TensorList indices, at::TensorList outs,
                   const at::Tensor& failures) {
  constexpr const char* kOp = "dcext::decode_indexed_";
  TORCH_CHECK_VALUE(indices.size() == payloads.size() && outs.size() == payloads.size(), kOp,
                    ": expected as many payloads as indices and outs, got ", payloads.size(), ", ",
                    indices.size(), " and ", outs.size());
  TORCH_CHECK_TYPE(failures.scalar_type() == at::kInt, kOp,
                   ": failures: expected torch.int32, got ", failures.scalar_type());
  TORCH_CHECK_VALUE(failures.numel() == 1, kOp, ": failures: expected one element, got shape ",
                    failures.sizes());
  const at::Device device = failures.device();
  for (size_t i = 0; i < payloads.size(); ++i) {
    const at::Tensor &payload = payloads[i], &index = indices[i], &out = outs[i];
    TORCH_CHECK_TYPE(payload.scalar_type() == at::kByte && index.scalar_type() == at::kByte &&
                         out.scalar_type() == at::kChar,
                     kOp, ": expected torch.uint8 payloads and indices and torch.int8 outs, got ",
                     payload.scalar_type(), ", ", index.scalar_type(), " and ", out.scalar_type());
    TORCH_CHECK_VALUE(
        payload.device() == device && index.device() == device && out.device() == device, kOp,
        ": expected all tensors on ", device, ", the device of failures, got ", payload.device(),
        ", ", index.device(), " and ", out.device());
    TORCH_CHECK_VALUE(payload.dim() == 1 && payload.is_contiguous() && payload.numel() % 4 == 0 &&
                          reinterpret_cast<uintptr_t>(payload.const_data_ptr()) % 4 == 0,
                      kOp, ": payloads[", i,
                      "]: expected a contiguous 1-D tensor, aligned to and a ",
                      "multiple of 4 bytes, got shape ", payload.sizes());
    TORCH_CHECK_VALUE(index.dim() == 2 && index.size(1) == sizeof(SeekBlock) &&
                          index.is_contiguous() &&
                          reinterpret_cast<uintptr_t>(index.const_data_ptr()) % 16 == 0,
                      kOp, ": indices[", i, "]: expected a contiguous tensor of shape [blocks, ",
                      sizeof(SeekBlock), "] aligned to 16 bytes, got shape ", index.sizes());
    TORCH_CHECK_VALUE(out.dim() == 2 && out.is_contiguous(), kOp, ": outs[", i,
                      "]: expected a contiguous 2-D tensor, got shape ", out.sizes(), ", strides ",
                      out.strides());
  }
}

DecodeTarget decode_target(const at::Tensor& payload, const at::Tensor& out) {
  DecodeTarget target{};
  target.payload = payload.const_data_ptr<uint8_t>();
  target.payload_nbytes = static_cast<uint64_t>(payload.numel());
  target.out = out.mutable_data_ptr<int8_t>();
  target.rows = static_cast<uint64_t>(out.size(0));
  target.cols = static_cast<uint64_t>(out.size(1));
  return target;
}

void decode_indexed_cpu(at::TensorList payloads, at::TensorList indices, at::TensorList outs,
                        at::Tensor failures) {
  check_indexed(payloads, indices, outs, failures);
  std::atomic<int32_t> found{0};
  TorchExecutor executor;
  for (size_t i = 0; i < payloads.size(); ++i) {
    const DecodeTarget target = decode_target(payloads[i], outs[i]);
    const auto* blocks = reinterpret_cast<const SeekBlock*>(indices[i].const_data_ptr<uint8_t>());
    executor.run(indices[i].size(0),
                 [&](int64_t block, int) { found |= decode_seek_block(blocks[block], target); });
  }
  *failures.mutable_data_ptr<int32_t>() |= found;
}

}  // namespace dcext
