#include "frame_writer.h"

#include <algorithm>

namespace dcext::fuzz {
namespace {

constexpr int64_t kMost = int64_t{128} << 10;  // of a block

void append_le(uint64_t value, int nbytes, ByteVector* dst) {
  for (int i = 0; i < nbytes; ++i) dst->push_back(static_cast<uint8_t>(value >> (8 * i)));
}

int ceil_log2(int n) {
  int log = 0;
  while (1 << log < n) ++log;
  return log;
}

}  // namespace

bool FrameWriter::write(int64_t nbytes, Outside outside, ByteVector* frame, ByteVector* content) {
  frame_ = frame;
  content_ = content;
  outside_ = outside;
  num_blocks_ = 0;
  is_outside_ = outside == Outside::kDictionaryId;
  has_code_ = others_since_code_ = false;
  write_header(nbytes, outside == Outside::kDictionaryId);
  write_blocks(nbytes);
  counts_.add(num_blocks_ == 1   ? Variant::kFrame1Block
              : num_blocks_ <= 8 ? Variant::kFrame2To8Blocks
                                 : Variant::kFrameMoreBlocks);
  if (nbytes > kMost) counts_.add(Variant::kFrameOver128Kib);
  return is_outside_;
}

void FrameWriter::write_header(int64_t nbytes, bool dictionary) {
  append_le(0xfd2fb528u, 4, frame_);
  const bool single = random_.one_in(3);
  const int smallest = single ? 0 : 1;  // code of the width of the content size; 0 needs `single`
  int width = static_cast<int>(random_.between(smallest, 3));
  if (width == 0 && nbytes > 255) width = 2;
  if (width == 1 && (nbytes < 256 || nbytes > 65791)) width = 2;
  if (!single && random_.one_in(4)) width = 0;  // not recorded
  const bool zero_id = !dictionary && random_.one_in(16);
  const int id_width = dictionary || zero_id ? static_cast<int>(random_.between(1, 3)) : 0;
  frame_->push_back(static_cast<uint8_t>(width << 6 | (single ? 32 : 0) | id_width));
  if (single) {
    block_size_max_ = std::min(nbytes, kMost);
  } else {
    const int exponent = static_cast<int>(random_.between(0, 17)), mantissa = random_.byte() & 7;
    frame_->push_back(static_cast<uint8_t>(exponent << 3 | mantissa));
    const int64_t base = int64_t{1024} << exponent;
    block_size_max_ = std::min(base + base / 8 * mantissa, kMost);
  }
  if (id_width != 0)
    append_le(dictionary ? 1 + random_.below(255) : 0, 1 << (id_width - 1), frame_);
  if (width == 0 && single) append_le(static_cast<uint64_t>(nbytes), 1, frame_);
  if (width == 1) append_le(static_cast<uint64_t>(nbytes - 256), 2, frame_);
  if (width >= 2) append_le(static_cast<uint64_t>(nbytes), width == 2 ? 4 : 8, frame_);
  counts_.add(single ? Variant::kHeaderSingleSegment : Variant::kHeaderWindow);
  if (zero_id) counts_.add(Variant::kHeaderDictionaryIdZero);
  if (single || width != 0) {
    counts_.add(Variant::kContentSize1Byte, width);
  } else {
    counts_.add(Variant::kHeaderNoContentSize);
  }
}

// Sizes near what decoders treat differently, and any. Large frames get large blocks, so that these stay fast.
int64_t FrameWriter::next_size(int64_t left) {
  int64_t size = left;
  if (random_.one_in(3)) {
    size = random_.pick({0, 0, 1, 2, 3, 5, 6, 7, 9, 15, 16, 31, 32, 255, 256, 257});
  } else if (random_.one_in(4)) {
    size = random_.pick({1023, 1024, 1025, 4095, 4096, 4097, 16383, 16384, kMost - 1, kMost});
  } else if (random_.one_in(2)) {
    size = random_.between(0, left);
  }
  if (left > 16384 && !random_.one_in(4)) size = std::max(size, left / 4);
  return std::min({size, left, block_size_max_});
}

void FrameWriter::write_blocks(int64_t nbytes) {
  for (int64_t left = nbytes;;) {
    const int64_t size = next_size(left);
    left -= size;
    const bool is_last = left == 0 && !random_.one_in(20);  // else an empty one follows
    write_block(size, is_last);
    ++num_blocks_;
    if (is_last) return;
  }
}

void FrameWriter::write_block(int64_t size, bool is_last) {
  const uint64_t kind = random_.below(12);
  if (outside_ == Outside::kTwelveBits && !has_code_ && write_huffman(false, size, is_last)) return;
  if (kind == 0) return write_plain_block(true, size, is_last);
  const bool plain = kind == 1 || kind == 2;
  if (plain && write_plain_literals(kind == 1, size, is_last)) return;
  const bool huffman = kind >= 4;
  if (huffman && write_huffman(has_code_ && kind >= 9, size, is_last)) return;
  write_plain_block(false, size, is_last);
}

void FrameWriter::write_block_header(int type, int64_t size, bool is_last) {
  append_le(static_cast<uint64_t>(size << 3 | type << 1 | (is_last ? 1 : 0)), 3, frame_);
}

void FrameWriter::write_plain_block(bool repeated, int64_t size, bool is_last) {
  write_block_header(repeated ? 1 : 0, size, is_last);
  const uint8_t byte = random_.byte();
  if (repeated) frame_->push_back(byte);
  for (int64_t i = 0; i < size; ++i) {
    content_->push_back(repeated ? byte : random_.byte());
    if (!repeated) frame_->push_back(content_->back());
  }
  const Variant first = size == 0 ? Variant::kBlockEmptyRaw : Variant::kBlockRaw;
  counts_.add(first, repeated ? 1 : 0);
  others_since_code_ = true;
}

// A literals section and no sequences. False, with nothing written, where the block would be too large.
bool FrameWriter::write_compressed_block(const ByteVector& literals, const ByteVector& regenerated,
                                         bool is_last) {
  const bool long_count = outside_ == Outside::kLongSequenceCount;
  const int64_t size = static_cast<int64_t>(literals.size()) + (long_count ? 2 : 1);
  if (size > block_size_max_) return false;
  write_block_header(2, size, is_last);
  frame_->insert(frame_->end(), literals.begin(), literals.end());
  frame_->push_back(long_count ? 128 : 0);
  if (long_count) frame_->push_back(0);
  is_outside_ |= long_count;
  content_->insert(content_->end(), regenerated.begin(), regenerated.end());
  return true;
}

bool FrameWriter::write_plain_literals(bool repeated, int64_t size, bool is_last) {
  const int smallest = size < 32 ? 0 : size < 4096 ? 1 : 2;
  const int width = static_cast<int>(random_.between(smallest, 2));
  const int type = repeated ? 1 : 0, nbytes = width + 1;
  const int format = width == 2 ? 3 : width;
  ByteVector literals, regenerated(static_cast<size_t>(size), random_.byte());
  append_le(static_cast<uint64_t>(size << (width == 0 ? 3 : 4) | format << 2 | type), nbytes,
            &literals);
  if (repeated) {
    literals.push_back(size == 0 ? 7 : regenerated[0]);
  } else {
    for (uint8_t& byte : regenerated) byte = random_.byte();
    literals.insert(literals.end(), regenerated.begin(), regenerated.end());
  }
  if (!write_compressed_block(literals, regenerated, is_last)) return false;
  counts_.add(repeated ? Variant::kLiteralsRepeated5Bits : Variant::kLiteralsRaw5Bits, width);
  if (size == 0) counts_.add(Variant::kBlockEmptyCompressed);
  others_since_code_ = true;
  return true;
}

bool FrameWriter::choose_code(int64_t size, ByteVector* description) {
  const bool twelve = outside_ == Outside::kTwelveBits;
  const int most_symbols = size < 64 && !random_.one_in(4) ? 32 : 256;
  int num_symbols = static_cast<int>(random_.between(2, most_symbols));
  if (random_.one_in(4)) num_symbols = static_cast<int>(random_.pick({2, 3, 4, 8, 16}));
  if (random_.one_in(24)) num_symbols = 256;
  if (twelve) num_symbols = std::max(num_symbols, 13);
  const int most_bits = std::min(num_symbols - 1, 11);
  const int table_log =
      twelve ? 12 : static_cast<int>(random_.between(ceil_log2(num_symbols), most_bits));
  code_ = random_code(random_, num_symbols, table_log);
  // libzstd has no room for tables of 64 entries and a weight of 12.
  const int fse_log = twelve ? 5 : static_cast<int>(random_.between(5, 6));
  by_fse_ = random_.one_in(2) && describe_by_fse(code_, fse_log, description);
  if (by_fse_ || describe_directly(code_, description)) return true;
  by_fse_ = describe_by_fse(code_, fse_log, description);
  return by_fse_;
}

// As the code expects, or what makes the longest or the shortest streams.
ByteVector FrameWriter::random_content(int64_t size) {
  ByteVector content(static_cast<size_t>(size));
  const uint64_t kind = random_.below(10);
  const size_t n = code_.entries.size();
  for (uint8_t& byte : content) {
    byte = kind == 0   ? code_.entries[random_.below(2)]  // longest codes come first
           : kind == 1 ? code_.entries[n - 1]
                       : code_.entries[random_.below(n)];
  }
  if (size > 0 && kind < 2) counts_.add(Variant::kCodesAllLongest, static_cast<int>(kind));
  return content;
}

bool FrameWriter::append_literals_header(bool treeless, int64_t size, int64_t stored, int* format,
                                         ByteVector* dst) {
  const int64_t larger = std::max(size, stored);
  if (*format == 0 && larger > 1023) return false;
  if (*format != 0) {
    const int smallest = larger < 1024 ? 1 : larger < 16384 ? 2 : 3;
    *format = static_cast<int>(random_.between(smallest, 3));
  }
  const int bits = *format < 2 ? 10 : *format == 2 ? 14 : 18;
  if (larger >= int64_t{1} << bits) return false;
  const uint64_t header = static_cast<uint64_t>(size) << 4 |
                          static_cast<uint64_t>(stored) << (4 + bits) |
                          static_cast<uint64_t>(*format << 2 | (treeless ? 3 : 2));
  append_le(header, *format < 2 ? 3 : *format + 2, dst);
  return true;
}

bool FrameWriter::write_huffman(bool treeless, int64_t size, bool is_last) {
  const HuffmanCode before = code_;
  const bool had_code = has_code_;
  ByteVector body, literals;
  has_code_ = treeless || choose_code(size, &body);
  const ByteVector content = has_code_ ? random_content(size) : ByteVector();
  int format = size < 6 || (size < 1024 && random_.one_in(2)) ? 0 : 1;
  if (has_code_ && format == 0) {
    append_stream(code_, content.data(), size, &body);
  } else if (has_code_) {
    const int64_t each = (size + 3) / 4;
    ByteVector streams;
    for (int i = 0; i < 4; ++i) {
      const size_t begin = streams.size();
      append_stream(code_, content.data() + i * each, i < 3 ? each : size - 3 * each, &streams);
      if (i < 3) append_le(streams.size() - begin, 2, &body);
    }
    body.insert(body.end(), streams.begin(), streams.end());
  }
  const bool written = has_code_ &&
                       append_literals_header(treeless, size, static_cast<int64_t>(body.size()),
                                              &format, &literals) &&
                       (literals.insert(literals.end(), body.begin(), body.end()),
                        write_compressed_block(literals, content, is_last));
  if (written) {
    count_huffman(treeless, format, size);
    others_since_code_ = false;
    is_outside_ |= code_.table_log > 11;
  } else {  // the tree of the block before goes on
    code_ = before;
    has_code_ = had_code;
  }
  return written;
}

void FrameWriter::count_huffman(bool treeless, int format, int64_t size) {
  if (!treeless) {
    counts_.add(Variant::kHuffman1Stream, format);
    count_code();
  } else {
    counts_.add(Variant::kTreeless1Stream, format == 0 ? 0 : 1);
    if (others_since_code_) counts_.add(Variant::kTreelessAfterOtherBlocks);
  }
  constexpr struct {
    int64_t size;
    Variant variant;
  } kSizes[] = {{0, Variant::kBlockEmptyHuffman},
                {1, Variant::kSize1},
                {5, Variant::kSize5},
                {6, Variant::kSize6},
                {7, Variant::kSize7},
                {255, Variant::kSize255},
                {256, Variant::kSize256},
                {1023, Variant::kSize1023},
                {1024, Variant::kSize1024},
                {1025, Variant::kSize1025},
                {4095, Variant::kSize4095},
                {4096, Variant::kSize4096},
                {4097, Variant::kSize4097},
                {kMost, Variant::kSize128Kib}};
  for (const auto& known : kSizes) {
    if (size == known.size) counts_.add(known.variant);
  }
  if (size == 9 && format != 0) counts_.add(Variant::kSize9LastStreamEmpty);
  if (size % 4 != 0) counts_.add(Variant::kSizeNoMultipleOf4);
}

void FrameWriter::count_code() {
  counts_.add(by_fse_ ? Variant::kTreeByFse : Variant::kTreeDirect);
  const int n = code_.num_symbols;
  counts_.add(Variant::kAlphabet2, n == 2 ? 0 : n <= 16 ? 1 : n <= 128 ? 2 : n <= 255 ? 3 : 4);
  if (code_.table_log <= 11) counts_.add(Variant::kTableLog1, code_.table_log - 1);
}

}  // namespace dcext::fuzz
