#pragma once

#include <cstdint>

#include "codec/seek_index.h"
#include "huffman_writer.h"

namespace dcext::fuzz {

/** Decodes one frame without sequences, a bit at a time and straight from RFC 8878: slow, and sharing nothing with what
 *  is tested but libzstd's reading of frame headers and trees.
 *  @param nbytes   that it should decode to.
 *  @param content   receives what was decoded.
 *  @param lax   set where libzstd is known to be more lenient than the format. Its fast loops for four streams do not
 *      look where these end; its tables of two symbols, which a single stream without a tree of its own can meet, take
 *      bits that are left over, or missing, for the rest of a last pair. Nor does it compare the sizes of raw and
 *      repeated blocks with the largest.
 *  @return kIndexed where the frame is right, kOutsideProfile where it has what the seek index leaves to libzstd. */
SeekResult decode_strictly(const uint8_t* src, size_t src_size, uint64_t nbytes,
                           ByteVector* content, bool* lax);

}  // namespace dcext::fuzz
