#pragma once

#include <cstdint>

#include "codec/seek_index.h"
#include "huffman_writer.h"

namespace dcext::fuzz {

/** Decodes one frame without sequences, a bit at a time and straight from RFC 8878: slow, and sharing nothing with what
 *  is tested but libzstd's reading of frame headers and trees.
 *  @param nbytes   that it should decode to.
 *  @param content   receives what was decoded.
 *  @param lax   set where libzstd is known to be more lenient than the format: it does not compare the ends of four
 *      streams in its fast loops, and the sizes of raw and repeated blocks with the largest.
 *  @return kIndexed where the frame is right, kOutsideProfile where it has what the seek index leaves to libzstd. */
SeekResult decode_strictly(const uint8_t* src, size_t src_size, uint64_t nbytes,
                           ByteVector* content, bool* lax);

}  // namespace dcext::fuzz
