#include "torch/ops_common.h"

#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "codec/payload_encoder.h"
#include "codec/zstd_frame.h"
#include "runtime/memory.h"
#include "runtime/thread_pool.h"

namespace dcext {
namespace {

Isa initial_isa() {
  const char* name = std::getenv("DCEXT_CPU");
  if (name == nullptr || *name == '\0') return supported_isas().back();
  Isa isa;
  TORCH_CHECK_VALUE(parse_isa(name, &isa),
                    "DCEXT_CPU: expected scalar, avx2, avxvnni, avx512vnni or amx, got '", name,
                    "'");
  TORCH_CHECK_VALUE(isa_supported(isa), "DCEXT_CPU: this machine has no '", name,
                    "'; its best is '", isa_name(supported_isas().back()), "'");
  return isa;
}

std::atomic<Isa>& isa_setting() {
  static std::atomic<Isa> setting{initial_isa()};
  return setting;
}

CodecChoice parse_choice(c10::string_view codec, int64_t level, const int8_t* qweight, int64_t rows,
                         int64_t cols, Executor& executor) {
  TORCH_CHECK_VALUE(codec == "auto" || codec == "raw" || codec == "zstd" || codec == "packed",
                    "dcext::encode: codec: expected 'auto', 'raw', 'zstd' or 'packed', got '",
                    codec, "'");
  TORCH_CHECK_VALUE(level >= 0 && level <= kMaxZstdLevel, "dcext::encode: level: expected 1..",
                    kMaxZstdLevel, " or 0 for literals only, got ", level);
  TORCH_CHECK_VALUE(level == 0 || codec == "zstd",
                    "dcext::encode: level: expected none with codec '", codec, "', got ", level);
  CodecChoice choice{Codec::kZstd, static_cast<int>(level)};
  if (codec == "raw") choice.codec = Codec::kRaw;
  if (codec == "packed") choice.codec = Codec::kPacked;
  if (codec != "auto") return choice;
  const Status status = choose_codec(qweight, rows, cols, executor, &choice);
  raise_if_failed("dcext::encode", Failure{status, "sample tiles", -1, 0, 0});
  return choice;
}

}  // namespace

void raise_failure(const char* op, const Failure& failure) {
  std::ostringstream message;
  message << op << ": " << to_string(failure.status);
  switch (failure.status) {
    case Status::kReadError:
      TORCH_CHECK(false, message.str(), ": ", std::strerror(static_cast<int>(failure.found)));
    case Status::kClosed: TORCH_CHECK(false, message.str(), ": expected a stream that is open");
    case Status::kFileChanged: message << ": " << failure.field; break;
    default:
      if (failure.chunk >= 0) message << " in chunk " << failure.chunk;
      message << ": " << failure.field;
  }
  if (failure.status == Status::kBadChecksum || failure.status == Status::kBadMagic) {
    message << std::hex;
  }
  if (failure.status == Status::kCorrupt) {
    message << ": expected " << failure.expected << ", the coded data end early or are damaged";
  } else {
    message << ": expected " << failure.expected << ", found " << failure.found;
  }
  const c10::SourceLocation where{__func__, __FILE__, static_cast<uint32_t>(__LINE__)};
  switch (failure.status) {
    case Status::kOutOfMemory: throw c10::OutOfMemoryError(where, message.str());
    case Status::kBadArgument:
    case Status::kDstTooSmall:
    case Status::kInternal:
    case Status::kDeviceError: throw c10::Error(where, message.str());
    default: throw FormatError(where, message.str());
  }
}

PayloadView parse_payload(const char* op, const at::Tensor& payload) {
  TORCH_CHECK_TYPE(payload.scalar_type() == at::kByte, op, ": payload: expected torch.uint8, got ",
                   payload.scalar_type());
  TORCH_CHECK_VALUE(payload.dim() == 1 && payload.is_contiguous() && payload.is_cpu(), op,
                    ": payload: expected a contiguous 1-D CPU tensor, got shape ", payload.sizes(),
                    " on ", payload.device());
  PayloadView view;
  raise_if_failed(op, PayloadView::parse(payload.const_data_ptr<uint8_t>(),
                                         static_cast<size_t>(payload.numel()), &view));
  return view;
}

ElementType element_type(const char* op, const char* argument, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return ElementType::kFloat32;
    case at::kBFloat16: return ElementType::kBFloat16;
    case at::kHalf: return ElementType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", argument,
                       ": expected torch.float32, torch.bfloat16 or torch.float16, got ", dtype);
  }
}

const float* vector_data(const char* op, const char* argument, const at::Tensor& vector,
                         int64_t size, at::Device device) {
  TORCH_CHECK_TYPE(vector.scalar_type() == at::kFloat, op, ": ", argument,
                   ": expected torch.float32, got ", vector.scalar_type());
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == size && vector.is_contiguous() &&
                        vector.device() == device,
                    op, ": ", argument, ": expected a contiguous tensor of shape [", size, "] on ",
                    device, ", got shape ", vector.sizes(), " on ", vector.device());
  return vector.const_data_ptr<float>();
}

const float* optional_vector_data(const char* op, const char* argument,
                                  const std::optional<at::Tensor>& vector, int64_t size,
                                  at::Device device) {
  return vector.has_value() ? vector_data(op, argument, *vector, size, device) : nullptr;
}

at::Tensor encode(const at::Tensor& qweight, c10::string_view codec, int64_t level,
                  int64_t slab_cols) {
  TORCH_CHECK_TYPE(qweight.scalar_type() == at::kChar,
                   "dcext::encode: qweight: expected torch.int8, got ", qweight.scalar_type());
  TORCH_CHECK_VALUE(qweight.dim() == 2 && qweight.is_cpu() && qweight.numel() > 0,
                    "dcext::encode: qweight: expected a non-empty 2-D CPU tensor, got shape ",
                    qweight.sizes(), " on ", qweight.device());
  TORCH_CHECK_VALUE(slab_cols >= 0, "dcext::encode: slab_cols: expected 0 or more, got ",
                    slab_cols);
  const int64_t rows = qweight.size(0), cols = qweight.size(1);
  TORCH_CHECK_VALUE(rows <= kMaxDimension && cols <= kMaxDimension,
                    "dcext::encode: qweight: expected at most ", kMaxDimension,
                    " rows and columns, got shape ", qweight.sizes());
  const at::Tensor contiguous = qweight.contiguous();
  const int8_t* src = contiguous.const_data_ptr<int8_t>();
  PoolExecutor executor(default_pool(), default_pool().num_threads());
  const CodecChoice choice = parse_choice(codec, level, src, rows, cols, executor);
  at::Tensor payload;
  const Status status = encode_payload(src, plan_layout(rows, cols, slab_cols, choice), executor,
                                       [&](uint64_t nbytes) {
                                         payload = empty_weights(static_cast<int64_t>(nbytes));
                                         return payload.mutable_data_ptr<uint8_t>();
                                       });
  raise_if_failed("dcext::encode", Failure{status, "tiles", -1, 0, 0});
  return payload;
}

void decode_out(const at::Tensor& payload, const Region& region, int64_t num_threads, Verify verify,
                at::Tensor& out) {
  constexpr const char* kOp = "dcext::decode_out";
  const PayloadView view = parse_payload(kOp, payload);
  const PayloadLayout& layout = view.layout();
  TORCH_CHECK_VALUE(
      0 <= region.row_begin && region.row_begin < region.row_end && region.row_end <= layout.rows,
      kOp, ": rows: expected a range inside [0, ", layout.rows, "), got [", region.row_begin, ", ",
      region.row_end, ")");
  TORCH_CHECK_VALUE(
      0 <= region.col_begin && region.col_begin < region.col_end && region.col_end <= layout.cols,
      kOp, ": columns: expected a range inside [0, ", layout.cols, "), got [", region.col_begin,
      ", ", region.col_end, ")");
  TORCH_CHECK_TYPE(out.scalar_type() == at::kChar, kOp, ": out: expected torch.int8, got ",
                   out.scalar_type());
  TORCH_CHECK_VALUE(out.is_cpu() && out.dim() == 2 && out.size(0) == region.rows() &&
                        out.size(1) == region.cols() && out.stride(1) == 1 &&
                        out.stride(0) >= out.size(1),
                    kOp, ": out: expected a CPU tensor of shape [", region.rows(), ", ",
                    region.cols(), "] with contiguous rows, got shape ", out.sizes(), ", strides ",
                    out.strides(), " on ", out.device());
  TORCH_CHECK_VALUE(num_threads >= 0, kOp, ": num_threads: expected 0 or more, got ", num_threads);
  ThreadPool& pool = default_pool();
  const int workers = num_threads == 0 ? pool.num_threads() : static_cast<int>(num_threads);
  PoolExecutor executor(pool, workers);
  raise_if_failed(kOp, decode_region(view, region, verify, out.mutable_data_ptr<int8_t>(),
                                     out.stride(0), executor));
}

at::Tensor empty_weights(int64_t nbytes) {
  TORCH_CHECK_VALUE(nbytes > 0, "empty_weights: nbytes: expected at least 1, got ", nbytes);
  uint8_t* data = allocate_weights(nbytes);
  TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "empty_weights: the system has no ", nbytes,
                   " bytes left");
  return at::from_blob(
      data, {nbytes}, [nbytes](void* p) { free_weights(static_cast<uint8_t*>(p), nbytes); },
      at::TensorOptions().dtype(at::kByte));
}

Isa selected_isa() { return isa_setting(); }

void set_selected_isa(Isa isa) { isa_setting() = isa; }

}  // namespace dcext
