#pragma once

#include <memory>

#include "runtime/link.h"

namespace dcext {

/** The way to an NVIDIA GPU.
 *
 *  Copies run on streams of the link's own, which do not wait for the legacy default stream. No call synchronizes the
 *  host but those that say so, and none disturbs captures of other streams: threads are in mode relaxed inside.
 *
 *  @param device   CUDA's index.
 *  @param link   receives the new one.
 *  @return kOk or kDeviceError (found: the cudaError_t). */
Failure make_cuda_link(int device, std::unique_ptr<Link>* link);

}  // namespace dcext
