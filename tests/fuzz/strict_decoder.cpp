#include "strict_decoder.h"

#define ZSTD_STATIC_LINKING_ONLY
#include <zstd.h>
extern "C" {
#include <common/huf.h>
}

#include <algorithm>
#include <cstddef>

namespace dcext::fuzz {
namespace {

constexpr SeekResult kOk = SeekResult::kIndexed, kCorrupt = SeekResult::kCorrupt,
                     kOutside = SeekResult::kOutsideProfile;

class StrictDecoder {
 public:
  StrictDecoder(const uint8_t* src, size_t size, ByteVector* content, bool* lax)
      : src_(src), end_(src + size), content_(content), lax_(lax) {}

  SeekResult decode_frame(uint64_t nbytes);

 private:
  size_t left() const { return static_cast<size_t>(end_ - src_); }
  uint64_t take_le(int n) {
    uint64_t value = 0;
    for (int i = 0; i < n; ++i) value |= uint64_t{*src_++} << (8 * i);
    return value;
  }
  void repeat(uint8_t byte, size_t n) { content_->insert(content_->end(), n, byte); }
  void copy(const uint8_t* src, size_t n) { content_->insert(content_->end(), src, src + n); }
  SeekResult decode_block(bool* is_last);
  SeekResult decode_compressed(const uint8_t* block_end);
  SeekResult decode_huffman(int format, bool treeless, const uint8_t* block_end);
  SeekResult read_tree(const uint8_t* end);
  bool decode_stream(const uint8_t* src, size_t size, size_t n);

  const uint8_t* src_;
  const uint8_t* end_;
  ByteVector* content_;
  bool* lax_;
  size_t block_size_max_ = 0;
  bool has_tree_ = false;
  int table_log_ = 0;
  ByteVector symbols_, lengths_;  // by table_log bits
};

SeekResult StrictDecoder::read_tree(const uint8_t* end) {
  uint8_t weights[256] = {};
  unsigned ranks[HUF_TABLELOG_MAX + 1], num_symbols = 0, table_log = 0;
  const size_t read = HUF_readStats(weights, sizeof(weights), ranks, &num_symbols, &table_log, src_,
                                    static_cast<size_t>(end - src_));
  if (ZSTD_isError(read)) return kCorrupt;
  if (table_log > 11) return kOutside;
  src_ += read;
  table_log_ = static_cast<int>(table_log);
  symbols_.clear();
  lengths_.clear();
  for (unsigned weight = 1; weight <= table_log; ++weight) {
    for (unsigned symbol = 0; symbol < num_symbols; ++symbol) {
      if (weights[symbol] != weight) continue;
      symbols_.insert(symbols_.end(), size_t{1} << (weight - 1), static_cast<uint8_t>(symbol));
      lengths_.insert(lengths_.end(), size_t{1} << (weight - 1),
                      static_cast<uint8_t>(table_log + 1 - weight));
    }
  }
  has_tree_ = true;
  return kOk;
}

bool StrictDecoder::decode_stream(const uint8_t* src, size_t size, size_t n) {
  if (src[size - 1] == 0) return false;
  int64_t bit = static_cast<int64_t>(size) * 8 - 1;
  const auto bit_at = [&](int64_t i) { return i < 0 ? 0 : src[i / 8] >> (i % 8) & 1; };
  while (bit_at(bit) == 0) --bit;
  for (size_t i = 0; i < n; ++i) {
    size_t entry = 0;
    for (int j = 1; j <= table_log_; ++j) entry = entry * 2 + bit_at(bit - j);
    content_->push_back(symbols_[entry]);
    bit -= lengths_[entry];
    if (bit < 0) return false;
  }
  return bit == 0;
}

SeekResult StrictDecoder::decode_huffman(int format, bool treeless, const uint8_t* block_end) {
  const int bits = format < 2 ? 10 : format == 2 ? 14 : 18, head = format < 2 ? 3 : format + 2;
  if (block_end - src_ < head) return kCorrupt;
  const uint64_t header = take_le(head), mask = (uint64_t{1} << bits) - 1;
  const size_t size = header >> 4 & mask, stored = header >> (4 + bits) & mask;
  if (static_cast<size_t>(block_end - src_) < stored) return kCorrupt;
  const uint8_t* const end = src_ + stored;
  if (!treeless) {
    if (const SeekResult result = read_tree(end); result != kOk) return result;
  }
  if (!has_tree_ || size > block_size_max_) return kCorrupt;
  if (format == 0) {
    const bool whole = src_ != end && decode_stream(src_, static_cast<size_t>(end - src_), size);
    *lax_ = !whole && treeless;
    src_ = end;
    return whole ? kOk : kCorrupt;
  }
  if (size < 6 || end - src_ < 10) return kCorrupt;
  size_t sizes[4] = {take_le(2), take_le(2), take_le(2), 0};
  const size_t all = static_cast<size_t>(end - src_), three = sizes[0] + sizes[1] + sizes[2];
  if (three >= all || std::min({sizes[0], sizes[1], sizes[2]}) == 0) return kCorrupt;
  sizes[3] = all - three;
  const size_t each = (size + 3) / 4;
  for (int i = 0; i < 4; ++i) {
    if (!decode_stream(src_, sizes[i], i < 3 ? each : size - 3 * each)) {
      *lax_ = true;
      return kCorrupt;
    }
    src_ += sizes[i];
  }
  return kOk;
}

SeekResult StrictDecoder::decode_compressed(const uint8_t* block_end) {
  if (block_end - src_ < 2) return kCorrupt;
  const int type = *src_ & 3, format = *src_ >> 2 & 3;
  const size_t before = content_->size();
  if (type >= 2) {
    const SeekResult result = decode_huffman(format, type == 3, block_end);
    if (result != kOk) return result;
  } else {
    const int head = format == 1 ? 2 : format == 3 ? 3 : 1;
    if (block_end - src_ < head) return kCorrupt;
    const size_t size = take_le(head) >> (head == 1 ? 3 : 4);
    const size_t stored = type == 0 ? size : 1;
    if (size > block_size_max_ || static_cast<size_t>(block_end - src_) < stored) return kCorrupt;
    type == 0 ? copy(src_, size) : repeat(*src_, size);
    src_ += stored;
  }
  if (content_->size() - before > block_size_max_ || src_ == block_end) return kCorrupt;
  if (*src_++ != 0) return kOutside;
  return src_ == block_end ? kOk : kCorrupt;
}

SeekResult StrictDecoder::decode_block(bool* is_last) {
  if (left() < 3) return kCorrupt;
  const uint64_t header = take_le(3);
  *is_last = header & 1;
  const int type = header >> 1 & 3;
  const size_t size = header >> 3, stored = type == 1 ? 1 : size;
  if (type == 3 || left() < stored) return kCorrupt;
  if (size > block_size_max_) {
    *lax_ = type < 2;
    return kCorrupt;
  }
  if (type == 2) return decode_compressed(src_ + stored);
  type == 0 ? copy(src_, size) : repeat(*src_, size);
  src_ += stored;
  return kOk;
}

SeekResult StrictDecoder::decode_frame(uint64_t nbytes) {
  ZSTD_FrameHeader header;
  if (ZSTD_getFrameHeader(&header, src_, left()) != 0) return kCorrupt;
  if (header.frameType != ZSTD_frame || header.dictID != 0 || header.checksumFlag) return kOutside;
  const bool sized = header.frameContentSize != ZSTD_CONTENTSIZE_UNKNOWN;
  if (sized && header.frameContentSize > nbytes) return kCorrupt;
  src_ += header.headerSize;
  block_size_max_ = header.blockSizeMax;
  for (bool is_last = false; !is_last;) {
    if (const SeekResult result = decode_block(&is_last); result != kOk) return result;
    if (content_->size() > nbytes) return kCorrupt;
  }
  if (sized && content_->size() != header.frameContentSize) return kCorrupt;
  if (left() != 0) return kOutside;  // another frame, or something else that libzstd will not like
  return content_->size() == nbytes ? kOk : kCorrupt;
}

}  // namespace

SeekResult decode_strictly(const uint8_t* src, size_t src_size, uint64_t nbytes,
                           ByteVector* content, bool* lax) {
  content->clear();
  *lax = false;
  return StrictDecoder(src, src_size, content, lax).decode_frame(nbytes);
}

}  // namespace dcext::fuzz
