#pragma once

#include "base/parallel.h"
#include "format/payload.h"

namespace dcext {

/** What `auto` decided, or what the caller asked for. */
struct CodecChoice {
  Codec codec = Codec::kZstd;
  int level = 0;  ///< kLiteralsOnly or 1..22; ignored for Codec::kRaw
};

/** Chooses for one matrix by coding a sample of it (up to eight tiles, evenly spread).
 *
 *  The variants are literals only (with or without nibbles, tile by tile), zstd level 3 and, where level 3 finds
 *  repeats, level 19. The smallest wins, but size is weighed against decode time: a variant is charged one percent of
 *  its size for each tenth by which it decodes slower than literals only, and raw is preferred to less than 2 % of
 *  saving. The decode speeds are constants (payload_encoder.cpp), not clock readings, so that the same weights always
 *  give the same bytes.
 *  @param rows, cols   at least 1 each.
 *  @return kOk, kOutOfMemory or kInternal. */
Status choose_codec(const int8_t* qweight, int64_t rows, int64_t cols, Executor& executor,
                    CodecChoice* choice);

/** The grid of tiles for a matrix: panels of at most about 256 KiB, two blocks of zstd of which the second reuses the
 *  Huffman table of the first, or half of that to be packed, so that widths follow the weights; of equal height where
 *  possible, a multiple of 16 rows.
 *  @param slab_cols   columns of a tile; 0 = all of them, so that a tile is one contiguous piece of the matrix. */
PayloadLayout plan_layout(int64_t rows, int64_t cols, int64_t slab_cols, const CodecChoice& choice);

/** Encodes a matrix. The same matrix and layout give the same bytes, whatever the executor.
 *  @param qweight   `layout.rows * layout.cols` weights, row-major and contiguous.
 *  @param allocate   called once, with the payload's size; returns the (at least 8-byte aligned) bytes to fill, or
 *      null, upon which the call fails with kOutOfMemory.
 *  @return kOk, kOutOfMemory or kInternal. */
Status encode_payload(const int8_t* qweight, const PayloadLayout& layout, Executor& executor,
                      FunctionRef<uint8_t*(uint64_t nbytes)> allocate);

}  // namespace dcext
