#pragma once

#include "codec/payload_decoder.h"
#include "runtime/read_source.h"

namespace dcext {

/** A payload in a file whose chunks are verified as they are read, as a payload in memory is when it is loaded: for
 *  pieces of whole panels that go where nobody verifies them any more. Borrows everything. */
class VerifiedPayload final : public ReadSource {
 public:
  /** @param head   of the payload, whose first byte is at `offset` of `file`. */
  VerifiedPayload(ReadSource& file, const PayloadView& head, int64_t offset);

  /** @return also kBadChecksum or kCorrupt. */
  Failure read(int64_t offset, int64_t nbytes, uint8_t* dst, const uint8_t** data) override;

 private:
  ReadSource& file_;
  const PayloadView& head_;
  const int64_t offset_;
  FormatChecks formats_;
};

}  // namespace dcext
