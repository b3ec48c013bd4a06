#pragma once

#include <cstdint>

#include "fuzz_random.h"
#include "huffman_writer.h"
#include "variants.h"

namespace dcext::fuzz {

/** Writes random zstd frames, bit by bit from RFC 8878, of every kind that the seek index covers. */
class FrameWriter {
 public:
  FrameWriter(Random& random, VariantCounts& counts) : random_(random), counts_(counts) {}

  /** What makes a frame one that only libzstd decodes. */
  enum class Outside { kNot, kDictionaryId, kTwelveBits, kLongSequenceCount };

  /** Appends a frame.
   *  @param nbytes   that it decodes to, at least 1.
   *  @param content   appended to: what it decodes to.
   *  @return whether it is outside as wished; small frames may have no block that can be. */
  bool write(int64_t nbytes, Outside outside, ByteVector* frame, ByteVector* content);

 private:
  void write_header(int64_t nbytes, bool dictionary);
  int64_t next_size(int64_t left);
  void write_blocks(int64_t nbytes);
  void write_block(int64_t size, bool is_last);
  void write_block_header(int type, int64_t size, bool is_last);
  void write_plain_block(bool repeated, int64_t size, bool is_last);
  bool write_compressed_block(const ByteVector& literals, const ByteVector& regenerated,
                              bool is_last);
  bool write_plain_literals(bool repeated, int64_t size, bool is_last);
  bool write_huffman(bool treeless, int64_t size, bool is_last);
  bool choose_code(int64_t size, ByteVector* description);
  ByteVector random_content(int64_t size);
  void count_huffman(bool treeless, int format, int64_t size);
  void count_code();
  bool append_literals_header(bool treeless, int64_t size, int64_t stored, int* format,
                              ByteVector* dst);

  Random& random_;
  VariantCounts& counts_;
  ByteVector* frame_ = nullptr;
  ByteVector* content_ = nullptr;
  Outside outside_ = Outside::kNot;
  int64_t block_size_max_ = 0;
  int num_blocks_ = 0;
  bool is_outside_ = false;
  bool has_code_ = false, others_since_code_ = false, by_fse_ = false;
  HuffmanCode code_;
};

}  // namespace dcext::fuzz
