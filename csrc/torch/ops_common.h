#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "base/cpu_features.h"
#include "base/element_type.h"
#include "codec/payload_decoder.h"

namespace dcext {

// What ops.cpp and bindings.cpp share: the edge between torch and the torch-free layers below.

/** Corrupt or foreign data; `dcext.FormatError` in Python. */
class FormatError : public c10::ValueError {
 public:
  using c10::ValueError::ValueError;
};

/** Throws FormatError (or OutOfMemoryError) with status, place, expected and found. */
[[noreturn]] void raise_failure(const char* op, const Failure& failure);

inline void raise_if_failed(const char* op, const Failure& failure) {
  if (!failure.ok()) raise_failure(op, failure);
}

/** Checks that `payload` is a contiguous 1-D uint8 CPU tensor and parses it. */
PayloadView parse_payload(const char* op, const at::Tensor& payload);

/** The dtype of `argument` for the layers below; TypeError unless float32, bfloat16 or float16. */
ElementType element_type(const char* op, const char* argument, at::ScalarType dtype);

/** The data of a contiguous float32 vector of `size` elements on `device`; TypeError or ValueError otherwise. */
const float* vector_data(const char* op, const char* argument, const at::Tensor& vector,
                         int64_t size, at::Device device);
const float* optional_vector_data(const char* op, const char* argument,
                                  const std::optional<at::Tensor>& vector, int64_t size,
                                  at::Device device);

/** Encodes `qweight` ((out_features, in_features) int8, CPU) on the library's pool.
 *  @param codec   "auto", "raw", "zstd" or "packed"; @param level 0 (literals only) or 1..22, for "zstd" only.
 *  @param slab_cols   columns of a tile, 0 = all. */
at::Tensor encode(const at::Tensor& qweight, c10::string_view codec, int64_t level,
                  int64_t slab_cols);

/** Decodes `region` into `out`, an int8 CPU tensor of its shape whose last dimension is contiguous.
 *  @param num_threads   0 = all of the pool. */
void decode_out(const at::Tensor& payload, const Region& region, int64_t num_threads, Verify verify,
                at::Tensor& out);

/** An uninitialized 1-D uint8 CPU tensor in memory from allocate_weights(). */
at::Tensor empty_weights(int64_t nbytes);

/** The instruction set that the layers use: the best one, DCEXT_CPU's, or the last one set. */
Isa selected_isa();
void set_selected_isa(Isa isa);

}  // namespace dcext
