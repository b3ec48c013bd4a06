#include "runtime/verified_payload.h"

namespace dcext {

VerifiedPayload::VerifiedPayload(ReadSource& file, const PayloadView& head, int64_t offset)
    : file_(file), head_(head), offset_(offset), formats_(head.layout().num_chunks()) {}

Failure VerifiedPayload::read(int64_t offset, int64_t nbytes, uint8_t* dst, const uint8_t** data) {
  if (const Failure bad = file_.read(offset, nbytes, dst, data); !bad.ok()) return bad;
  const auto begin = static_cast<uint64_t>(offset - offset_);
  const uint64_t end = begin + static_cast<uint64_t>(nbytes);
  const PayloadView here = head_.with_chunks(*data, begin);
  // Chunks lie in the order of their numbers: the first that ends behind the beginning, by bisection.
  int64_t first = 0;
  for (int64_t count = head_.layout().num_chunks(); count > 0;) {
    const int64_t half = count / 2;
    const bool is_before = head_.chunk(first + half).offset < begin;
    if (is_before) first += half + 1;
    count = is_before ? count - half - 1 : half;
  }
  for (int64_t i = first; i < head_.layout().num_chunks() && head_.chunk(i).offset < end; ++i) {
    if (const Failure bad = here.verify_chunk(i); !bad.ok()) return bad;
    if (const Failure bad = formats_.check(here, i); !bad.ok()) return bad;
  }
  return {};
}

}  // namespace dcext
