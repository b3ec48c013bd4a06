#pragma once

#include <cstdint>
#include <vector>

#include "format/payload.h"
#include "frame_writer.h"

namespace dcext::fuzz {

struct RandomPayload {
  ByteVector bytes;
  std::vector<int8_t> matrix;  ///< what it decodes to
  int64_t num_frames = 0;
  bool outside = false;   ///< has a frame or a list that only libzstd's path decodes
  bool decodable = true;  ///< by libzstd: but for frames that ask for a dictionary
};

/** A payload of random frames, filters, exceptions and tiles, with all its checksums. One in 50 is outside the
 *  profile. */
RandomPayload random_payload(Random& random, VariantCounts& counts);

/** Makes a payload of chunks: aligned, zeros between them, head and checksums right.
 *  @param chunks   their encodings, filters and frame_nbytes; offsets, sizes and checksums are set.
 *  @param stored   the bytes of each. */
ByteVector assemble_payload(const PayloadLayout& layout, std::vector<Chunk> chunks,
                            const std::vector<ByteVector>& stored);

}  // namespace dcext::fuzz
