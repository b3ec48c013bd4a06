#pragma once

#include <cstdint>

#include "base/parallel.h"
#include "codec/payload_decoder.h"
#include "format/payload.h"

namespace dcext {

// The seek index of a payload: what lets thousands of threads decode its frames at once.
//
// A Huffman stream is serial, as a code's length is known only once it has been read. The index notes where every
// 1,024th symbol of each stream begins, and the lengths of the codes, so that a thread can start at each. It is made
// from the payload when that is loaded (about as fast as libzstd decodes) and never stored: any file has one.
//
// It covers frames without matches, as our writer makes them (literals only, PAYLOAD.md) and any zstd reads them:
// blocks raw, repeated (RLE) or Huffman-coded in one stream or four, with a table of their own or the previous block's.

constexpr int kSegmentSymbols = 1024;
constexpr int kMaxStreams = 4;
constexpr int kMaxSegments = 32;  ///< of a stream: the largest block has 128 KiB
constexpr int64_t kMaxBlockNbytes = int64_t{128} << 10;
constexpr int kMaxTableLog = 11;  ///< bits of the longest code, by RFC 8878
constexpr int kNumSymbols = 256;

enum class SeekKind : uint8_t {
  kHuffman = 0,
  kRaw = 1,       ///< bytes as they are: a raw block, or a part of a raw tile
  kRepeated = 2,  ///< one byte, repeated
};

/** One block of one frame, self-contained. An index is an array of them, in the order of the chunks.
 *  `first` and `size` count *content*: bytes that the tile's frame decodes to, before the filter is undone. */
struct alignas(16) SeekBlock {
  uint64_t src;  ///< offset in the payload of the first stream, the raw bytes, or the repeated byte
  uint64_t planes;  ///< offset in the payload of the tile's bit planes; its exceptions follow them
  uint64_t dst;     ///< row * cols + column of the tile's first weight
  uint32_t tile_cols;
  uint32_t tile_weights;
  uint32_t first;           ///< position of the block in the tile's content
  uint32_t size;            ///< bytes that it decodes to, 1 to kMaxBlockNbytes
  uint32_t num_exceptions;  ///< of the tile
  uint32_t
      stream_nbytes[kMaxStreams];  ///< streams follow each other; 0 for those that there are not
  SeekKind kind;
  uint8_t num_streams;  ///< 1 or 4; of kHuffman only
  uint8_t table_log;    ///< bits of the longest code, 1 to kMaxTableLog
  uint8_t filter;       ///< Filter: low_bits + pairs
  /** Weights (RFC 8878) of the symbols' codes, two in a byte, that of the even symbol in its low half. A code has
   *  table_log + 1 - weight bits; weight 0: no code. */
  uint8_t weights[kNumSymbols / 2];
  uint16_t segment_bits[kMaxStreams][kMaxSegments];  ///< bits of each segment of each stream
};
static_assert(sizeof(SeekBlock) == 448, "the index is an array of 448 bytes a block");

/** How a frame or payload relates to the index. */
enum class SeekResult {
  kIndexed,
  kOutsideProfile,  ///< valid as far as it was read, but with matches or features that only libzstd decodes
  kCorrupt,
};

/** Indexes all chunks of a payload of codec raw or zstd.
 *  @param verify   whether chunks are compared with their checksums first. Without, damaged ones may be indexed:
 *      what is built on the index checks bounds, and finds streams that end elsewhere.
 *  @param allocate   returns room for that many blocks, aligned to 16 bytes, or null; called once, at the end, if all
 *      chunks are inside the profile.
 *  @param inside   receives whether they were.
 *  @return kOk, kBadArgument for codec packed, kBadChecksum, kCorrupt or kOutOfMemory: the lowest failing chunk's. */
Failure build_seek_index(const PayloadView& view, Verify verify, Executor& executor,
                         FunctionRef<SeekBlock*(int64_t num_blocks)> allocate, bool* inside);

}  // namespace dcext
