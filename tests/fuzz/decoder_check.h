#pragma once

#include <cstdint>
#include <vector>

#include "codec/seek_index.h"
#include "fuzz_input.h"

namespace dcext::fuzz {

/** How a payload fared. */
struct CheckResult {
  bool parsed = false;
  SeekResult seek = SeekResult::kCorrupt;
  bool libzstd_decodes = false;
  bool lax = false;      ///< libzstd decodes what the format, and so the index, calls corrupt
  int32_t failures = 0;  ///< DecodeFailure bits of the blocks, after patches
};

/** Runs an input through libzstd, the strict decoder and the seek index. Prints what is wrong and aborts if
 *  - the index and the strict decoder do not agree on what the payload is,
 *  - a payload that is indexed does not decode to the same matrix by all three,
 *  - libzstd decodes what the index calls corrupt (but where it is known to be lax).
 *  Then the patches are applied, and the blocks decoded again: whatever comes, it must stay in bounds, which the
 *  sanitizers watch over. All buffers are of the exact size, for their sake.
 *  @param expected   the matrix, or null where it is not known. */
CheckResult check_input(const FuzzInput& input, const std::vector<int8_t>* expected);

/** What runs now, to be written to a file where it ends badly. */
const FuzzInput* current_input();
[[noreturn]] void fail(const char* what);

}  // namespace dcext::fuzz
