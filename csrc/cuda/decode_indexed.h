#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "codec/seek_decode.h"

namespace dcext {

/** One matrix to decode. All pointers are device memory. */
struct DecodeJob {
  DecodeTarget target;
  const SeekBlock* blocks;
  int64_t num_blocks;
};

/** Jobs of one launch. They travel as the kernel's argument, so that a launch reads nothing else and a CUDA graph keeps
 *  them. */
constexpr int kMaxDecodeJobs = 48;

/** launch_decode_indexed():
 *  Decodes matrices by their seek indices, all of them in ceil(num_jobs / kMaxDecodeJobs) launches.
 *  @param jobs, num_jobs   host memory, read before the function returns.
 *  @param failures   one word; DecodeFailure bits are or-ed into it. What a failing block wrote is undefined, but inside
 *      its matrix.
 *  @return cudaGetLastError(), or cudaErrorInvalidValue for sizes out of range. Asynchronous on `stream`; allocates
 *  nothing. */
cudaError_t launch_decode_indexed(const DecodeJob* jobs, int64_t num_jobs, int32_t* failures,
                                  cudaStream_t stream);

}  // namespace dcext
