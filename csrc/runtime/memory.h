#pragma once

#include <cstdint>

namespace dcext {

/** Memory for weights that rest in RAM: whole 2 MiB pages of it are huge pages where the system gives them
 *  (madvise(2)), the tail ordinary ones, so nothing is rounded up. Weights read once per token miss the TLB on every
 *  4 KiB otherwise.
 *  @param nbytes   at least 1.
 *  @return zeroed memory aligned to at least 64 bytes, or null. Release with `free_weights(p, nbytes)`. */
uint8_t* allocate_weights(int64_t nbytes);
void free_weights(uint8_t* data, int64_t nbytes);

}  // namespace dcext
