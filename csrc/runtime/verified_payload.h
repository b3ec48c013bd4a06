#pragma once

#include "runtime/read_source.h"

namespace dcext {

/** A payload in a file whose chunks are compared with their checksums as they are read: for pieces of whole panels that
 *  go where nobody compares them any more. Borrows everything. */
class VerifiedPayload final : public ReadSource {
 public:
  /** @param head   of the payload, whose first byte is at `offset` of `file`. */
  VerifiedPayload(ReadSource& file, const PayloadView& head, int64_t offset);

  /** @return also kBadChecksum. */
  Failure read(int64_t offset, int64_t nbytes, uint8_t* dst, const uint8_t** data) override;

 private:
  ReadSource& file_;
  const PayloadView& head_;
  const int64_t offset_;
};

}  // namespace dcext
