#pragma once

#include <atomic>
#include <memory>

#include "base/parallel.h"
#include "format/payload.h"

namespace dcext {

/** A rectangle of the matrix, half open. */
struct Region {
  int64_t row_begin = 0, row_end = 0, col_begin = 0, col_end = 0;

  int64_t rows() const { return row_end - row_begin; }
  int64_t cols() const { return col_end - col_begin; }
};

/** Whether stored bytes are compared with their checksums before they are decoded. Layers check once, when a
 *  payload is loaded; everyone else each time. */
enum class Verify : bool { kNo = false, kYes = true };

/** Decodes one chunk: its tile, row-major and contiguous.
 *  @param dst   `view.tile(index).weights()` bytes, not overlapping the payload.
 *  @param dst_capacity   at least that; what lies between may be overwritten. kFrameSlack more is fastest.
 *  @return kOk, kBadChecksum, kCorrupt or kOutOfMemory. On failure `dst` is undefined but never overrun.
 *  Threading: any number of threads; work space is per thread and kept. */
Failure decode_chunk(const PayloadView& view, int64_t index, Verify verify, int8_t* dst,
                     int64_t dst_capacity);

/** Compares chunk `index` with its checksum and, without decoding it, checks what layers rely on afterwards.
 *  @return kOk, kBadChecksum or kCorrupt. */
Failure verify_chunk(const PayloadView& view, int64_t index);

/** What verify_chunk checks beside the checksum.
 *  @return kOk or kCorrupt. */
Failure check_format(const PayloadView& view, int64_t index);

/** check_format of a payload whose chunks are brought again and again: bytes whose checksum holds are the bytes that were
 *  checked before, so each chunk is looked at until it passed once. Threading: any number of threads. */
class FormatChecks {
 public:
  explicit FormatChecks(int64_t num_chunks);

  /** @param view   of the payload, with chunk `index`, whose checksum has been compared. */
  Failure check(const PayloadView& view, int64_t index);

 private:
  std::unique_ptr<std::atomic<bool>[]> passed_;
};

/** Decodes a rectangle straight to its place; only chunks that it touches are read.
 *  @param region   not empty, inside the matrix.
 *  @param dst, ld_dst   row-major destination and the distance of its rows in bytes, at least `region.cols()`.
 *  @return the failure of the lowest failing chunk, else kOk. */
Failure decode_region(const PayloadView& view, const Region& region, Verify verify, int8_t* dst,
                      int64_t ld_dst, Executor& executor);

}  // namespace dcext
