#pragma once

#include <cstdint>
#include <cstring>

#include "base/host_device.h"
#include "codec/seek_index.h"

namespace dcext {

// Decoding by a seek index, for one thread: what the CUDA kernel and the CPU share (cuda/decode_frames.cu,
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

DCEXT_HOST_DEVICE uint32_t load_word(const uint8_t* aligned) {
#if defined(__CUDA_ARCH__)
  return __ldg(reinterpret_cast<const unsigned*>(aligned));
#else
  uint32_t word;
  std::memcpy(&word, aligned, sizeof(word));
  return word;
#endif
}

/** Four bytes of the payload at any address. */
DCEXT_HOST_DEVICE uint32_t load_four(const uint8_t* src) {
  const uintptr_t misaligned = reinterpret_cast<uintptr_t>(src) & 3;
  const uint8_t* aligned = src - misaligned;
  const int shift = static_cast<int>(misaligned) * 8;
  const uint32_t low = load_word(aligned);
  if (shift == 0) return low;
  return low >> shift | load_word(aligned + 4) << (32 - shift);
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

/** Reads a stream, which runs backwards from its last byte, from any bit on. */
class SegmentReader {
 public:
  /** @param lowest   where the payload begins: words below are not read but taken for zeros.
   *  @param top   the bit before which to begin, counted from `lowest`; inside the payload. */
  DCEXT_HOST_DEVICE SegmentReader(const uint8_t* lowest, uint64_t top) : lowest_(lowest) {
    const int partial = static_cast<int>(top % 32);
    next_ = lowest + top / 32 * 4;
    window_ = 0;
    valid_ = 0;
    if (partial != 0) {
      window_ = static_cast<uint64_t>(load_word(next_)) << (64 - partial);
      valid_ = partial;
    }
  }

  /** Two symbols: the first in the low byte; `bits` grows by what they took. */
  DCEXT_HOST_DEVICE uint32_t next_two(const uint16_t* entries, int table_log, uint32_t* bits) {
    refill();
    const uint32_t first = next_one(entries, table_log, bits);
    return first | next_one(entries, table_log, bits) << 8;
  }

  /** One symbol; at least kMaxTableLog bits must be in the window. */
  DCEXT_HOST_DEVICE uint32_t next_one(const uint16_t* entries, int table_log, uint32_t* bits) {
    const uint32_t entry = entries[window_ >> (64 - table_log)];
    const int length = static_cast<int>(entry >> 8);
    window_ <<= length;
    valid_ -= length;
    *bits += static_cast<uint32_t>(length);
    return entry & 255;
  }

  /** Afterwards the window has 32 bits or more: two symbols and a bit. */
  DCEXT_HOST_DEVICE void refill() {
    if (valid_ >= 32) return;
    uint64_t word = 0;
    if (next_ > lowest_) {
      next_ -= 4;
      word = load_word(next_);
    }
    window_ |= word << (32 - valid_);
    valid_ += 32;
  }

 private:
  const uint8_t* lowest_;
  const uint8_t* next_;  ///< behind the word that comes next; never below `lowest_`
  uint64_t window_;
  int valid_;
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
  if (cols == 0 || block.tile_weights == 0 || block.tile_weights % cols != 0) return false;
  if (target.cols == 0 || block.tile_weights > kMaxTileWeights) return false;
  const uint64_t row = block.dst / target.cols, col = block.dst % target.cols;
  return block.kind <= SeekKind::kRepeated && block.filter <= 5 && block.size > 0 &&
         block.size <= kMaxBlockNbytes &&
         uint64_t{block.first} + block.size <= content_nbytes(block) && block.src <= nbytes &&
         src_nbytes <= nbytes - block.src && block.planes <= nbytes && behind <= nbytes &&
         col + cols <= target.cols && row <= target.rows &&
         block.tile_weights / cols <= target.rows - row;
}

/** Writes the weights of content bytes to their places, four at a time where they lie well. Keeps what it needs of the
 *  block, which the stores might alias. */
class TileWriter {
 public:
  DCEXT_HOST_DEVICE TileWriter(const SeekBlock& block, const DecodeTarget& target)
      : tile_(target.out + block.dst),
        planes_(target.payload + block.planes),
        exceptions_(target.payload + exceptions_offset(block)),
        cols_(target.cols),
        tile_cols_(block.tile_cols),
        weights_(block.tile_weights),
        first_(block.first),
        size_(block.size),
        low_bits_(low_bits(block)),
        pairs_(has_pairs(block)),
        is_aligned_(is_dense() && reinterpret_cast<uintptr_t>(tile_) % 4 == 0) {}

  /** @param position   of the first of the bytes in the tile's content.
   *  @param bytes   the first one in the lowest eight bits.
   *  @param count   1 to 4. */
  DCEXT_HOST_DEVICE void write(uint32_t position, uint32_t bytes, int count) const {
    if (count == 4 && position % 4 == 0) {
      write_four(position, bytes);
    } else {
      for (int i = 0; i < count; ++i) write_byte(position + i, bytes >> (8 * i) & 255);
    }
  }

  /** Writes exception `index` if its place is in the block; false where it is behind the tile. */
  DCEXT_HOST_DEVICE bool write_exception(uint32_t index) const {
    const uint32_t stored = load_four(exceptions_ + uint64_t{index} * 4);
    const uint32_t place = stored >> 8;
    if (place >= weights_) return false;
    const uint32_t position = pairs_ ? place / 128 * 64 + place % 64 : place;
    if (position - first_ < size_) *at(place) = static_cast<int8_t>(stored & 255);
    return true;
  }

 private:
  DCEXT_HOST_DEVICE bool is_dense() const { return tile_cols_ == cols_; }

  DCEXT_HOST_DEVICE int8_t* at(uint32_t place) const {
    if (is_dense()) return tile_ + place;
    return tile_ + place / tile_cols_ * cols_ + place % tile_cols_;
  }

  /** Low bits of the weight at `place`, and of the three behind it where `count` is 4 (place % 4 == 0). */
  DCEXT_HOST_DEVICE uint32_t lows(uint32_t place, int count) const {
    if (low_bits_ == 0) return 0;
    const uint32_t stride = 16 * low_bits_, in_group = place % 128;
    const uint8_t* stored = planes_ + uint64_t{place / 128} * stride + in_group % stride;
    const uint32_t shift = in_group / stride * low_bits_;
    const uint32_t mask = low_bits_ == 2 ? 0x03030303u : 0x0f0f0f0fu;
    return (count == 4 ? load_four(stored) : *stored) >> shift & mask;
  }

  /** Weights from highs (a byte each) and low bits. */
  DCEXT_HOST_DEVICE uint32_t joined(uint32_t highs, uint32_t place, int count) const {
    const uint32_t mask = low_bits_ == 0 ? ~0u : low_bits_ == 2 ? 0xfcfcfcfcu : 0xf0f0f0f0u;
    return (highs << low_bits_ & mask) | lows(place, count);
  }

  /** Highs of one half of pairs: value - 8 in each byte, without borrows between them. */
  DCEXT_HOST_DEVICE static uint32_t half_highs(uint32_t bytes, int half) {
    const uint32_t nibbles = bytes >> (4 * half) & 0x0f0f0f0fu;
    return ((nibbles | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
  }

  DCEXT_HOST_DEVICE void write_byte(uint32_t position, uint32_t byte) const {
    if (!pairs_) {
      *at(position) = static_cast<int8_t>(joined(byte, position, 1));
      return;
    }
    const uint32_t place = position / 64 * 128 + position % 64;
    for (int half = 0; half < 2; ++half) {
      const uint32_t p = place + 64 * half;
      if (p < weights_) *at(p) = static_cast<int8_t>(joined(half_highs(byte, half), p, 1));
    }
  }

  DCEXT_HOST_DEVICE void write_four(uint32_t position, uint32_t bytes) const {
    if (!pairs_) return store_four(position, joined(bytes, position, 4));
    const uint32_t place = position / 64 * 128 + position % 64;
    store_four(place, joined(half_highs(bytes, 0), place, 4));
    store_four(place + 64, joined(half_highs(bytes, 1), place + 64, 4));
  }

  DCEXT_HOST_DEVICE void store_four(uint32_t place, uint32_t weights) const {
    if (is_aligned_ && place + 4 <= weights_) {
#if defined(__CUDA_ARCH__)
      *reinterpret_cast<uint32_t*>(tile_ + place) = weights;
#else
      std::memcpy(tile_ + place, &weights, sizeof(weights));
#endif
      return;
    }
    for (uint32_t i = 0; i < 4; ++i) {
      if (place + i < weights_) *at(place + i) = static_cast<int8_t>(weights >> (8 * i) & 255);
    }
  }

  int8_t* tile_;
  const uint8_t* planes_;
  const uint8_t* exceptions_;
  uint64_t cols_;
  uint32_t tile_cols_, weights_, first_, size_;
  uint32_t low_bits_;
  bool pairs_, is_aligned_;
};

/** Decodes one block on one thread of a CPU: the kernel's steps, one after the other.
 *  @return DecodeFailure bits. */
int32_t decode_seek_block(const SeekBlock& block, const DecodeTarget& target);

}  // namespace dcext
