#pragma once

#include "capture_link.h"

namespace dcext {

/** The one that has streams and events; threads begin with 0, as they do in CUDA. */
constexpr int kEmulatedDevice = 1;

/** Whose streams the emulated CUDA runtime gives out. */
void set_emulated_device(CaptureLink* link);

/** How many pieces of memory are pinned. */
int64_t num_registered();

}  // namespace dcext
