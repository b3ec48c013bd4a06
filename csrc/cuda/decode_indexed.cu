#include "cuda/decode_indexed.h"

#include <algorithm>
#include <limits>

#include "cuda/decode_indexed_kernel.cuh"

namespace dcext {

cudaError_t launch_decode_indexed(const DecodeJob* jobs, int64_t num_jobs, int32_t* failures,
                                  cudaStream_t stream) {
  for (int64_t begin = 0; begin < num_jobs; begin += kMaxDecodeJobs) {
    Jobs launch{};
    launch.count = static_cast<int>(std::min<int64_t>(num_jobs - begin, kMaxDecodeJobs));
    int64_t num_blocks = 0;
    for (int i = 0; i < launch.count; ++i) {
      launch.jobs[i] = jobs[begin + i];
      launch.first_block[i] = num_blocks;
      num_blocks += jobs[begin + i].num_blocks;
    }
    if (num_blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
    if (num_blocks == 0) continue;
    decode_indexed_kernel<<<static_cast<unsigned>(num_blocks), kThreads, 0, stream>>>(launch,
                                                                                      failures);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace dcext
