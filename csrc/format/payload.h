#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bytes.h"
#include "base/status.h"

namespace dcext {

// The bytes are specified in PAYLOAD.md, beside this file.

constexpr uint16_t kPayloadVersion = 1;
constexpr int64_t kPayloadHeaderBytes = 64;
constexpr int64_t kChunkEntryBytes = 32;
constexpr int64_t kChunkAlignment = 64;
constexpr int64_t kMaxTileWeights = int64_t{1} << 24;  ///< an exception's position has 24 bits
constexpr int64_t kMaxDimension = int64_t{1} << 31;    ///< rows and columns, each

/** How a `qweight` is stored, as users name it. */
enum class Codec : uint8_t { kRaw = 0, kZstd = 1, kPacked = 2 };
constexpr int kNumCodecs = 3;
const char* codec_name(Codec codec);

/** How one chunk is stored: raw, which a tile that does not shrink stays in any payload, or as its codec stores it. */
enum class Encoding : uint8_t {
  kRaw = 0,     ///< the tile's weights, row-major
  kZstd = 1,    ///< one zstd frame of the filtered weights, then bit planes, then exceptions
  kPacked = 2,  ///< a table of weights, a code of fixed width for each weight, then exceptions
};
constexpr int kNumEncodings = 3;
const char* encoding_name(Encoding encoding);

/** The transform of a tile before it is coded (codec/filter.h). */
struct Filter {
  bool pairs = false;  ///< two highs share a byte
  int low_bits = 0;    ///< bits of each weight that are stored as they are; 0, 2 or 4

  bool identity() const { return !pairs && low_bits == 0; }
  /** Bytes of the bit planes of `n` weights. */
  int64_t planes_nbytes(int64_t n) const { return ceil_div(n, 128) * 16 * low_bits; }
};
constexpr int kMaxLowBits = 4;

// Packed chunks: codes lie in pieces of 64 bytes, `width` of them for each group of 32 columns of a block of 16 rows.
constexpr int kMinWidth = 2, kMaxWidth = 6;
constexpr int64_t kBlockRows = 16, kGroupCols = 32, kPieceNbytes = 64, kTableNbytes = 64;
constexpr int64_t kPackedExceptionNbytes = 3;  ///< column and weight
constexpr int64_t kMaxPackedCols =
    (int64_t{1} << 16) - kGroupCols;  ///< of a tile: exceptions are counted in 16 bits

/** The part of the matrix that one chunk holds. Chunks are numbered panel by panel, slab by slab. */
struct Tile {
  int64_t row = 0, col = 0, rows = 0, cols = 0;
  int64_t weights() const { return rows * cols; }
  constexpr int64_t num_blocks() const { return ceil_div(rows, kBlockRows); }
  constexpr int64_t num_groups() const { return ceil_div(cols, kGroupCols); }
};

/** Bytes of the numbers of exceptions of a packed tile's rows, which stand before its exceptions if it has any. */
constexpr int64_t exception_counts_nbytes(const Tile& tile) {
  return tile.num_blocks() * kBlockRows * 2;
}

/** What the header says of the matrix and its grid of tiles. */
struct PayloadLayout {
  Codec codec = Codec::kRaw;
  int16_t level = 0;       ///< zstd level; 0 = literals only
  int64_t rows = 0;        ///< out_features
  int64_t cols = 0;        ///< in_features
  int64_t panel_rows = 1;  ///< rows of a tile; the last panel may have fewer
  int64_t slab_cols = 1;   ///< columns of a tile; the last slab may have fewer

  int64_t num_panels() const { return ceil_div(rows, panel_rows); }
  int64_t num_slabs() const { return ceil_div(cols, slab_cols); }
  int64_t num_chunks() const { return num_panels() * num_slabs(); }
  Tile tile(int64_t chunk_index) const;
  /** Offset of the first chunk: the end of the chunk table, aligned. */
  int64_t chunks_begin() const {
    return static_cast<int64_t>(
        align_up(kPayloadHeaderBytes + num_chunks() * kChunkEntryBytes, kChunkAlignment));
  }
};

/** One entry of the chunk table. */
struct Chunk {
  uint64_t offset = 0;        ///< from the payload's first byte, a multiple of kChunkAlignment
  uint32_t nbytes = 0;        ///< stored bytes: frame, planes and exceptions, or the raw tile
  uint32_t frame_nbytes = 0;  ///< bytes of the zstd frame; 0 but for Encoding::kZstd
  Encoding encoding = Encoding::kRaw;
  Filter filter;          ///< of Encoding::kZstd
  int width = 0;          ///< bits of a code; 0 but for Encoding::kPacked
  uint64_t checksum = 0;  ///< XXH3-64 of the extent: stored bytes and the zeros behind them

  /** Bytes of the codes of a packed tile. */
  int64_t codes_nbytes(const Tile& tile) const {
    return tile.num_blocks() * tile.num_groups() * width * kPieceNbytes;
  }
  /** Exceptions of a tile; negative or fractional sizes never pass PayloadView::parse. */
  int64_t num_exceptions(const Tile& tile) const;
  uint64_t extent_end() const { return align_up(offset + nbytes, kChunkAlignment); }
};

/** Why a payload was refused, in full: what, where, and the two numbers that disagree. */
struct Failure {
  Status status = Status::kOk;
  const char* field = "";
  int64_t chunk = -1;  ///< -1: the header or the table as a whole
  uint64_t expected = 0;
  uint64_t found = 0;

  bool ok() const { return status == Status::kOk; }
};

/** A parsed payload: the layout, and access to the chunk table that stays where it is. Borrows `data`. */
class PayloadView {
 public:
  /** Validates header and chunk table (sizes, order, bounds, checksum) before anything is allocated.
   *  Touches the header and the table only, so a memory-mapped payload is not read.
   *  @param data, nbytes   the payload; `nbytes` is exact.
   *  @return a Failure whose status is kOk, kTruncated, kBadMagic, kBadVersion, kBadHeader or kBadChecksum. */
  static Failure parse(const uint8_t* data, size_t nbytes, PayloadView* view);

  /** The same for a payload of `nbytes` bytes of which only the first `head_nbytes` are here: chunks lie elsewhere.
   *  @return as parse; kTruncated also where the chunk table is not all there. */
  static Failure parse_head(const uint8_t* head, size_t head_nbytes, size_t nbytes,
                            PayloadView* view);

  /** This payload with its chunks in another place: the one at `offset` at `chunks_data`. Borrows it too. */
  PayloadView with_chunks(const uint8_t* chunk, uint64_t offset) const;

  const PayloadLayout& layout() const { return layout_; }
  /** A chunk's stored bytes are at `data() + chunk.offset`; other offsets mean nothing where chunks lie elsewhere. */
  const uint8_t* data() const { return data_; }
  Chunk chunk(int64_t index) const;
  Tile tile(int64_t index) const { return layout_.tile(index); }

  /** Compares the checksum of chunk `index` with its stored bytes. Returns kOk or kBadChecksum. */
  Failure verify_chunk(int64_t index) const;

 private:
  PayloadLayout layout_;
  const uint8_t* head_ = nullptr;  // header and chunk table
  const uint8_t* data_ = nullptr;
};

/** Writes header and chunk table, checksum included, to the `layout.chunks_begin()` bytes at `dst`.
 *  @param chunks   `layout.num_chunks()` entries, in order.
 *  @param nbytes   size of the whole payload. */
void write_payload_head(const PayloadLayout& layout, const Chunk* chunks, uint64_t nbytes,
                        uint8_t* dst);

}  // namespace dcext
