#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"

struct ZSTD_CCtx_s;
struct ZSTD_DCtx_s;

namespace dcext {

/** The "level" that this library adds to Zstandard's 1..22: Huffman-coded literals and no search for matches.
 *  Quantized weights have no repeats, so it is as small as any level, and faster both ways (PAYLOAD.md). */
constexpr int kLiteralsOnly = 0;
constexpr int kMaxZstdLevel = 22;

/** Bytes that `FrameEncoder::encode` may need for `src_size` bytes of input. */
size_t frame_bound(size_t src_size);

/** Writes ordinary zstd frames (RFC 8878), content size recorded, no checksum of zstd's own.
 *  One per thread; holds libzstd's work space (some MiB at high levels). */
class FrameEncoder {
 public:
  /** @param level   kLiteralsOnly or 1..22. */
  explicit FrameEncoder(int level);
  ~FrameEncoder();
  FrameEncoder(const FrameEncoder&) = delete;
  FrameEncoder& operator=(const FrameEncoder&) = delete;

  /** Encodes one frame into `dst`; the same input always gives the same bytes.
   *  @param dst_capacity   at least `frame_bound(src_size)`.
   *  @param frame_size     receives the bytes written.
   *  @return kOk, kDstTooSmall, kOutOfMemory or kInternal. */
  Status encode(const uint8_t* src, size_t src_size, uint8_t* dst, size_t dst_capacity,
                size_t* frame_size);

 private:
  ZSTD_CCtx_s* context_;
};

/** Room behind a frame's output that libzstd likes to have: it then decodes the literals of a block straight to where
 *  it copies them from, instead of in two parts, which takes about 4 % longer (128 KiB: the largest block). */
constexpr int64_t kFrameSlack = (int64_t{128} << 10) + 128;

/** Decodes one frame of exactly `dst_size` bytes with this thread's decoder.
 *  @param src, src_size   the frame, exactly.
 *  @param dst_capacity   at least `dst_size`; what lies between is overwritten with anything. Fastest with kFrameSlack.
 *  @return kOk; kCorrupt where the frame is damaged or of another size; kOutOfMemory. On failure the content of
 *      `dst` is undefined but never overrun. Allocates at a thread's first call only. */
Status decode_frame(const uint8_t* src, size_t src_size, uint8_t* dst, size_t dst_size,
                    size_t dst_capacity);

}  // namespace dcext
