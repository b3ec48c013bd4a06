#pragma once

#include <cstdint>
#include <cstring>

#include "base/host_device.h"
#include "codec/seek_index.h"

namespace dcext {

// Decoding by a seek index, for one thread: what the CUDA kernel and the CPU share (cuda/decode_indexed_kernel.cuh,
// codec/seek_decode.cpp). Nothing here trusts the payload or the index: reads and writes stay inside what DecodeTarget
// names, and a stream that does not end where the index says is reported.

/** Why a block could not be decoded; bits, so that threads can report into one word. */
enum DecodeFailure : int32_t {
  kDecodeOk = 0,
  kDecodeBadIndex = 1,      ///< the index points outside the payload or the matrix
  kDecodeBadTable = 2,      ///< lengths of codes that no code has
  kDecodeBadStream = 4,     ///< a segment ends elsewhere than the index says
  kDecodeBadException = 8,  ///< an exception behind the end of its tile
};

/** A payload and the matrix that it decodes to. */
struct DecodeTarget {
  const uint8_t* payload;   ///< aligned to 4 bytes
  uint64_t payload_nbytes;  ///< a multiple of 4
  int8_t* out;              ///< (rows, cols), dense
  uint64_t rows, cols;
};

DCEXT_HOST_DEVICE uint32_t load_word(const uint32_t* aligned) {
#if defined(__CUDA_ARCH__)
  return __ldg(aligned);
#else
  uint32_t word;
  std::memcpy(&word, aligned, sizeof(word));
  return word;
#endif
}

/** Four words, sixteen bytes, the first in the lowest bits of the first word: what a thread of a GPU stores at once. */
struct alignas(16) Quad {
  uint32_t words[4];
};
constexpr uint32_t kQuadNbytes = sizeof(Quad);

/** Words of the payload at any address. */
template <int kWords>
DCEXT_HOST_DEVICE void load_words(const uint8_t* src, uint32_t (&words)[kWords]) {
  const uintptr_t misaligned = reinterpret_cast<uintptr_t>(src) & 3;
  const uint32_t* aligned = reinterpret_cast<const uint32_t*>(src - misaligned);
  uint32_t word = load_word(aligned);
  for (int i = 0; i < kWords; ++i) {
    const bool is_read = i + 1 < kWords || misaligned != 0;  // else it may be behind the payload
    const uint32_t next = is_read ? load_word(aligned + i + 1) : 0;
    words[i] = static_cast<uint32_t>((uint64_t{next} << 32 | word) >> (8 * misaligned));
    word = next;
  }
}

// ---- Tables ----------------------------------------------------------------------------------------------------------

/** The decoding table of a block. Entry e, whose table_log bits begin with a code: symbol | length << 8.
 *  Built in steps that any number of threads share: count_symbols of each weight, `finish_counts`, list_symbols of each
 *  weight, table_entry of each entry. */
struct HuffmanTable {
  uint16_t entries[1 << kMaxTableLog];
  uint8_t symbols[kNumSymbols];  ///< by weight, then by value
  uint16_t counts[16];           ///< symbols of each weight
  uint16_t first_symbol[16];     ///< of each weight, in `symbols`
  uint16_t first_entry[16];      ///< of each weight, in `entries`
};

DCEXT_HOST_DEVICE int symbol_weight(const SeekBlock& block, int symbol) {
  return block.weights[symbol / 2] >> (symbol % 2 * 4) & 15;
}

DCEXT_HOST_DEVICE void count_symbols(const SeekBlock& block, int weight, HuffmanTable* table) {
  int count = 0;
  for (int symbol = 0; symbol < kNumSymbols; ++symbol) {
    count += symbol_weight(block, symbol) == weight;
  }
  table->counts[weight] = static_cast<uint16_t>(count);
}

/** From counts to first symbols and entries, of weights 1 to 12.
 *  @return whether the lengths are those of a complete code. */
DCEXT_HOST_DEVICE bool finish_counts(const SeekBlock& block, HuffmanTable* table) {
  uint32_t symbols = 0, entries = 0;
  for (int weight = 1; weight <= kMaxTableLog + 1; ++weight) {
    table->first_symbol[weight] = static_cast<uint16_t>(symbols);
    table->first_entry[weight] = static_cast<uint16_t>(entries);
    if (weight > block.table_log) continue;
    symbols += table->counts[weight];
    entries += static_cast<uint32_t>(table->counts[weight]) << (weight - 1);
  }
  return entries == 1u << block.table_log;
}

DCEXT_HOST_DEVICE void list_symbols(const SeekBlock& block, int weight, HuffmanTable* table) {
  int place = table->first_symbol[weight];
  for (int symbol = 0; symbol < kNumSymbols; ++symbol) {
    if (symbol_weight(block, symbol) == weight) {
      table->symbols[place++] = static_cast<uint8_t>(symbol);
    }
  }
}

DCEXT_HOST_DEVICE uint16_t table_entry(const SeekBlock& block, const HuffmanTable& table,
                                       int entry) {
  int weight = 1;
  for (int next = 2; next <= block.table_log; ++next) weight += entry >= table.first_entry[next];
  const int place =
      table.first_symbol[weight] + ((entry - table.first_entry[weight]) >> (weight - 1));
  return static_cast<uint16_t>(table.symbols[place] | (block.table_log + 1 - weight) << 8);
}

// ---- Streams ---------------------------------------------------------------------------------------------------------

/** Symbols of a stream: ceil(size / 4) for each but the last of four. */
DCEXT_HOST_DEVICE uint32_t stream_symbols(const SeekBlock& block, int stream) {
  if (block.num_streams == 1) return stream == 0 ? block.size : 0;
  const uint32_t each = (block.size + 3) / 4;
  return stream < 3 ? each : block.size - 3 * each;
}

/** Reads a segment of a stream, which runs backwards, from any bit on. The bits to come are those of two words from bit
 *  `used_` on, counted from the highest; another word is loaded ahead of its use. */
class SegmentReader {
 public:
  /** @param lowest   where the payload begins; what is in front of it reads as its first word.
   *  @param top   the bit before which to begin, counted from `lowest`; inside the payload. */
  DCEXT_HOST_DEVICE SegmentReader(const uint8_t* lowest, uint64_t top) {
    const uint64_t in_front = top / 32;  // words
    next_ = static_cast<int32_t>(in_front < kMaxWords ? in_front : kMaxWords);
    words_ = reinterpret_cast<uintptr_t>(lowest) + (in_front - static_cast<uint32_t>(next_)) * 4;
    window_ = uint64_t{load(next_)} << 32 | load(next_ - 1);
    next_ -= 2;
    ahead_ = load(next_);
    used_ = 32 - static_cast<uint32_t>(top % 32);
  }

  /** Where the next code begins: bits above some fixed bit. */
  DCEXT_HOST_DEVICE int32_t position() const { return next_ * 32 - static_cast<int32_t>(used_); }

  /** Reads `count` symbols.
   *  @param dst   room for that many bytes, aligned to 16. */
  DCEXT_HOST_DEVICE void read(const uint16_t* entries, int table_log, uint32_t count, Quad* dst) {
    const uint32_t quads = count / kQuadNbytes;
    for (uint32_t i = 0; i < quads; ++i) dst[i] = next_quad(entries, table_log);
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(dst);
    for (uint32_t i = quads * kQuadNbytes; i < count; ++i) {
      refill();
      bytes[i] = static_cast<uint8_t>(next_entry(entries, table_log));
    }
  }

 private:
  /** More than a segment has, and its symbols at most take. */
  static constexpr uint64_t kMaxWords = kSegmentSymbols * kMaxTableLog / 32 + 4;

  DCEXT_HOST_DEVICE uint32_t load(int32_t index) const {
    const uint32_t inside = static_cast<uint32_t>(index > 0 ? index : 0);
    return load_word(reinterpret_cast<const uint32_t*>(words_) + inside);
  }

  /** Afterwards there are 32 bits or more: two codes and some. */
  DCEXT_HOST_DEVICE void refill() {
    if (used_ < 32) return;
    used_ -= 32;
    window_ = window_ << 32 | ahead_;
    ahead_ = load(--next_);
  }

  /** The symbol in the lowest byte, others above; at least kMaxTableLog bits must be there. */
  DCEXT_HOST_DEVICE uint32_t next_entry(const uint16_t* entries, int table_log) {
    const uint32_t bits = static_cast<uint32_t>(window_ << used_ >> 32);
    const uint32_t entry = entries[bits >> (32 - table_log)];
    used_ += entry >> 8;
    return entry;
  }

  DCEXT_HOST_DEVICE Quad next_quad(const uint16_t* entries, int table_log) {
    Quad quad;
    for (uint32_t& word : quad.words) {
      refill();
      const uint32_t first = next_entry(entries, table_log);
      const uint32_t second = next_entry(entries, table_log);
      refill();
      const uint32_t third = next_entry(entries, table_log);
      const uint32_t fourth = next_entry(entries, table_log);
      word = (first & 255) | (second & 255) << 8 | (third & 255) << 16 | fourth << 24;
    }
    return quad;
  }

  uintptr_t words_;  ///< a number, or nvcc would add up the parts of a pointer at each load
  int32_t next_;     ///< word that is in `ahead_`; below 0 where a damaged segment goes too far
  uint32_t ahead_, used_;
  uint64_t window_;
};

/** The bit behind a stream's symbols: below the highest one of its last byte. 0 where that byte is zero.
 *  @param end   offset in the payload of the byte behind the stream; at least 1. */
DCEXT_HOST_DEVICE uint64_t stream_top(const DecodeTarget& target, uint64_t end) {
  uint32_t last = target.payload[end - 1];
  if (last == 0) return 0;
  int highest = 0;
  while (last >>= 1) ++highest;
  return (end - 1) * 8 + static_cast<uint64_t>(highest);
}

// ---- From content to weights -----------------------------------------------------------------------------------------

DCEXT_HOST_DEVICE bool has_pairs(const SeekBlock& block) { return block.filter & 1; }
DCEXT_HOST_DEVICE uint32_t low_bits(const SeekBlock& block) { return block.filter & 6; }

DCEXT_HOST_DEVICE uint64_t content_nbytes(const SeekBlock& block) {
  if (!has_pairs(block)) return block.tile_weights;
  return (uint64_t{block.tile_weights} + 127) / 128 * 64;
}

DCEXT_HOST_DEVICE uint64_t exceptions_offset(const SeekBlock& block) {
  return block.planes + (uint64_t{block.tile_weights} + 127) / 128 * 16 * low_bits(block);
}

/** Whether all that the index points at lies inside the payload and the matrix. */
DCEXT_HOST_DEVICE bool is_inside(const SeekBlock& block, const DecodeTarget& target) {
  const uint64_t nbytes = target.payload_nbytes;
  uint64_t src_nbytes = block.kind == SeekKind::kRaw ? block.size : 1;
  if (block.kind == SeekKind::kHuffman) {
    src_nbytes = 0;
    const bool single = block.num_streams == 1;
    if (!single && block.num_streams != kMaxStreams) return false;
    if (block.table_log < 1 || block.table_log > kMaxTableLog) return false;
    if (single ? block.size > kSegmentSymbols : block.size < 6) return false;
    for (int i = 0; i < block.num_streams; ++i) {
      if (block.stream_nbytes[i] == 0) return false;
      src_nbytes += block.stream_nbytes[i];
    }
  }
  const uint64_t behind = exceptions_offset(block) + uint64_t{block.num_exceptions} * 4;
  const uint64_t cols = block.tile_cols;
  if (cols == 0 || target.cols == 0 || block.tile_weights % cols != 0) return false;
  if (block.tile_weights == 0 || block.tile_weights > kMaxTileWeights) return false;
  const uint64_t row = block.dst / target.cols, col = block.dst % target.cols;
  return block.kind <= SeekKind::kRepeated && block.filter <= 5 && block.size > 0 &&
         block.size <= kMaxBlockNbytes &&
         uint64_t{block.first} + block.size <= content_nbytes(block) && block.src <= nbytes &&
         src_nbytes <= nbytes - block.src && block.planes <= nbytes && behind <= nbytes &&
         col + cols <= target.cols && row < target.rows &&
         block.tile_weights / cols <= target.rows - row;
}

/** Writes the weights of content bytes to their places. Keeps what every write needs of the block, which the stores
 *  might alias. */
class TileWriter {
 public:
  DCEXT_HOST_DEVICE TileWriter(const SeekBlock& block, const DecodeTarget& target)
      : tile_(target.out + block.dst),
        planes_(target.payload + block.planes),
        cols_(static_cast<uint32_t>(target.cols)),
        tile_cols_(block.tile_cols),
        weights_(block.tile_weights),
        low_bits_(low_bits(block)),
        pairs_(has_pairs(block)),
        is_aligned_(reinterpret_cast<uintptr_t>(tile_) % kQuadNbytes == 0 &&
                    (is_dense() || (tile_cols_ % kQuadNbytes == 0 && cols_ % kQuadNbytes == 0))) {}

  /** Writes the weights of 16 bytes at once, where they lie for it: whole, aligned, in one row.
   *  @param position   of the first of them in the tile's content.
   *  @return whether it did; otherwise they are written one by one. */
  DCEXT_HOST_DEVICE bool write_quad(uint32_t position, const Quad& bytes) const {
    if (!is_aligned_ || position % kQuadNbytes != 0) return false;
    if (!pairs_ && low_bits_ == 0) {
      store(position, bytes);
      return true;
    }
    const uint32_t place = pairs_ ? first_of_pair(position) : position;
    if (pairs_ && place + 64 + kQuadNbytes > weights_) return false;  // filling, perhaps
    Quad lows{};
    if (low_bits_ != 0) load_words(lows_at(place), lows.words);
    const uint32_t shift = lows_shift(place);
    if (!pairs_) {
      store(place, joined(bytes, lows, shift));
      return true;
    }
    for (uint32_t half = 0; half < 2; ++half) {
      Quad highs;
      for (int i = 0; i < 4; ++i) highs.words[i] = half_highs(bytes.words[i], half);
      store(place + 64 * half, joined(highs, lows, shift + 4 * half));
    }
    return true;
  }

  /** Writes the weights of one byte. */
  DCEXT_HOST_DEVICE void write_byte(uint32_t position, uint32_t byte) const {
    if (!pairs_) {
      *at(position) = joined_byte(byte, position);
      return;
    }
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t p = first_of_pair(position) + 64 * half;
      if (p < weights_) *at(p) = joined_byte(half_highs(byte, half), p);
    }
  }

  /** Writes exception `index` of the tile if its place is in the block; false where it is behind the tile. */
  DCEXT_HOST_DEVICE bool write_exception(const SeekBlock& block, const DecodeTarget& target,
                                         uint32_t index) const {
    const uint64_t offset = exceptions_offset(block) + uint64_t{index} * 4;
    uint32_t stored[1];
    load_words(target.payload + offset, stored);
    const uint32_t place = stored[0] >> 8;
    if (place >= weights_) return false;
    const uint32_t position = pairs_ ? place / 128 * 64 + place % 64 : place;
    if (position - block.first < block.size) *at(place) = static_cast<int8_t>(stored[0] & 255);
    return true;
  }

 private:
  DCEXT_HOST_DEVICE bool is_dense() const { return tile_cols_ == cols_; }

  DCEXT_HOST_DEVICE int8_t* at(uint32_t place) const {
    if (is_dense()) return tile_ + place;
    return tile_ + uint64_t{place / tile_cols_} * cols_ + place % tile_cols_;
  }

  /** Where the low bits of the weight at `place` are: in the byte at lows_at(), from bit lows_shift() on. Those of the
   *  weights behind it follow in the next bytes, up to a multiple of 32; those of the weight 64 places behind it in the
   *  first half of a group are in the same byte, four bits higher. */
  DCEXT_HOST_DEVICE const uint8_t* lows_at(uint32_t place) const {
    const uint32_t stride = 1u << stride_log();
    return planes_ + uint64_t{place / 128} * stride + (place & (stride - 1));
  }
  DCEXT_HOST_DEVICE uint32_t lows_shift(uint32_t place) const {
    return (place % 128 >> stride_log()) * low_bits_;
  }
  /** Of the bytes that the low bits of a group take: 32 or 64. */
  DCEXT_HOST_DEVICE uint32_t stride_log() const { return 4 + low_bits_ / 2; }

  DCEXT_HOST_DEVICE int8_t joined_byte(uint32_t high, uint32_t place) const {
    if (low_bits_ == 0) return static_cast<int8_t>(high & 255);
    const uint32_t low = *lows_at(place) >> lows_shift(place) & ((1u << low_bits_) - 1);
    return static_cast<int8_t>((high << low_bits_ & 255) | low);
  }

  /** Weights from highs and low bits, a byte each; the latter from bit `shift` on. */
  DCEXT_HOST_DEVICE Quad joined(const Quad& highs, const Quad& lows, uint32_t shift) const {
    if (low_bits_ == 0) return highs;
    const uint32_t mask = low_bits_ == 2 ? 0x03030303u : 0x0f0f0f0fu;
    Quad weights;
    for (int i = 0; i < 4; ++i) {
      weights.words[i] = (highs.words[i] << low_bits_ & ~mask) | (lows.words[i] >> shift & mask);
    }
    return weights;
  }

  /** Where the first of the two weights belongs that share a byte; the other one's place is 64 behind. */
  DCEXT_HOST_DEVICE static uint32_t first_of_pair(uint32_t position) {
    return position + (position & ~63u);
  }

  /** Highs of one half of pairs: value - 8 in each byte, without borrows between them. */
  DCEXT_HOST_DEVICE static uint32_t half_highs(uint32_t bytes, uint32_t half) {
    const uint32_t nibbles = bytes >> (4 * half) & 0x0f0f0f0fu;
    return ((nibbles | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
  }

  DCEXT_HOST_DEVICE void store(uint32_t place, const Quad& weights) const {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<Quad*>(at(place)) = weights;
#else
    std::memcpy(at(place), &weights, sizeof(weights));
#endif
  }

  int8_t* tile_;
  const uint8_t* planes_;
  uint32_t cols_, tile_cols_, weights_;
  uint32_t low_bits_;
  bool pairs_, is_aligned_;
};

/** Decodes one block on one thread of a CPU: the kernel's steps, one after the other.
 *  @return DecodeFailure bits. */
int32_t decode_seek_block(const SeekBlock& block, const DecodeTarget& target);

}  // namespace dcext
