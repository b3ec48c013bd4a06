#pragma once

#include <cstdint>

#include "format/payload.h"

namespace dcext {

/** Something that bytes are read from. */
class ReadSource {
 public:
  /** Bytes of a destination beyond what is asked for: what alignment may add before and behind. */
  static constexpr int64_t kSlackNbytes = 8192;

  virtual ~ReadSource() = default;

  /** Reads `nbytes` bytes at `offset`.
   *  @param dst   page-aligned, `nbytes + kSlackNbytes` bytes.
   *  @param data   receives where in `dst` the bytes lie; its address is congruent to `offset` modulo 4096.
   *  @return kOk, kReadError (found: errno) or kFileChanged. On failure `dst` is undefined.
   *  Threading: any number of calls at the same time. */
  virtual Failure read(int64_t offset, int64_t nbytes, uint8_t* dst, const uint8_t** data) = 0;
};

}  // namespace dcext
