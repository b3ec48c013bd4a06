#pragma once

#include <cstddef>
#include <cstdint>

namespace dcext {

/** XXH3, 64 bits, seed 0, of `nbytes` bytes at `data` (may be null when `nbytes` is 0).
 *  The widest instruction set of the machine is chosen at the first call; the value never depends on it. */
uint64_t checksum64(const void* data, size_t nbytes);

}  // namespace dcext
