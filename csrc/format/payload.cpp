#include "format/payload.h"

#include "base/checksum.h"

namespace dcext {
namespace {

constexpr char kMagic[8] = {'D', 'C', 'E', 'X', 'T', 'P', 'L', '\n'};

// Byte offsets of the header's fields (PAYLOAD.md).
constexpr int kVersionAt = 8, kCodecAt = 10, kReserved0At = 11, kLevelAt = 12, kReserved1At = 14;
constexpr int kRowsAt = 16, kColsAt = 24, kPanelRowsAt = 32, kSlabColsAt = 36, kNbytesAt = 40;
constexpr int kNumChunksAt = 48, kReserved2At = 52, kChecksumAt = 56;
// ... and of a chunk entry's.
constexpr int kOffsetAt = 0, kStoredAt = 8, kFrameAt = 12, kEncodingAt = 16, kBitsAt = 17,
              kPairsAt = 18;
constexpr int kChunkChecksumAt = 24;

Failure failure(Status status, const char* field, uint64_t expected, uint64_t found,
                int64_t chunk = -1) {
  return Failure{status, field, chunk, expected, found};
}

// The hash of two hashes: the header before its checksum, and the table with the zeros behind it.
uint64_t head_checksum(const uint8_t* data, int64_t chunks_begin) {
  const uint64_t parts[2] = {checksum64(data, kChecksumAt),
                             checksum64(data + kPayloadHeaderBytes,
                                        static_cast<size_t>(chunks_begin - kPayloadHeaderBytes))};
  return checksum64(parts, sizeof(parts));
}

Failure check_identity(const uint8_t* data, size_t nbytes) {
  if (nbytes < static_cast<size_t>(kPayloadHeaderBytes)) {
    return failure(Status::kTruncated, "payload bytes", kPayloadHeaderBytes, nbytes);
  }
  if (std::memcmp(data, kMagic, sizeof(kMagic)) != 0) {
    return failure(Status::kBadMagic, "magic",
                   load_le<uint64_t>(reinterpret_cast<const uint8_t*>(kMagic)),
                   load_le<uint64_t>(data));
  }
  const uint16_t version = load_le<uint16_t>(data + kVersionAt);
  if (version != kPayloadVersion) {
    return failure(Status::kBadVersion, "version", kPayloadVersion, version);
  }
  return {};
}

// Ranges are checked before any product is formed, so nothing below can overflow int64_t.
Failure read_layout(const uint8_t* data, PayloadLayout* layout) {
  const uint8_t codec = data[kCodecAt];
  const uint64_t rows = load_le<uint64_t>(data + kRowsAt);
  const uint64_t cols = load_le<uint64_t>(data + kColsAt);
  const uint64_t panel_rows = load_le<uint32_t>(data + kPanelRowsAt);
  const uint64_t slab_cols = load_le<uint32_t>(data + kSlabColsAt);
  if (codec >= kNumCodecs) return failure(Status::kBadHeader, "codec", kNumCodecs - 1, codec);
  if (rows == 0 || rows > kMaxDimension) {
    return failure(Status::kBadHeader, "rows", kMaxDimension, rows);
  }
  if (cols == 0 || cols > kMaxDimension) {
    return failure(Status::kBadHeader, "cols", kMaxDimension, cols);
  }
  if (panel_rows == 0 || panel_rows > rows) {
    return failure(Status::kBadHeader, "panel_rows", rows, panel_rows);
  }
  if (slab_cols == 0 || slab_cols > cols) {
    return failure(Status::kBadHeader, "slab_cols", cols, slab_cols);
  }
  if (panel_rows * slab_cols > static_cast<uint64_t>(kMaxTileWeights)) {
    return failure(Status::kBadHeader, "tile weights", kMaxTileWeights, panel_rows * slab_cols);
  }
  if (codec == static_cast<uint8_t>(Codec::kPacked) &&
      slab_cols > static_cast<uint64_t>(kMaxPackedCols)) {
    return failure(Status::kBadHeader, "slab_cols", kMaxPackedCols, slab_cols);
  }
  if (data[kReserved0At] != 0 || load_le<uint16_t>(data + kReserved1At) != 0 ||
      load_le<uint32_t>(data + kReserved2At) != 0) {
    return failure(Status::kBadHeader, "reserved bytes", 0, 1);
  }
  layout->codec = static_cast<Codec>(codec);
  layout->level = load_le<int16_t>(data + kLevelAt);
  layout->rows = static_cast<int64_t>(rows);
  layout->cols = static_cast<int64_t>(cols);
  layout->panel_rows = static_cast<int64_t>(panel_rows);
  layout->slab_cols = static_cast<int64_t>(slab_cols);
  return {};
}

Failure check_sizes(const uint8_t* data, size_t here, size_t nbytes, const PayloadLayout& layout) {
  const uint64_t stated = load_le<uint64_t>(data + kNbytesAt);
  if (stated != nbytes) {
    return failure(nbytes < stated ? Status::kTruncated : Status::kBadHeader, "payload bytes",
                   stated, nbytes);
  }
  const uint64_t num_chunks = load_le<uint32_t>(data + kNumChunksAt);
  // Two factors of at most 2^31 each: the product fits in 63 bits.
  if (num_chunks != static_cast<uint64_t>(layout.num_chunks())) {
    return failure(Status::kBadHeader, "chunks", layout.num_chunks(), num_chunks);
  }
  // num_chunks has 32 bits, so that the end of the table cannot overflow either.
  const uint64_t chunks_begin = static_cast<uint64_t>(layout.chunks_begin());
  if (here < chunks_begin) return failure(Status::kTruncated, "chunk table", chunks_begin, here);
  const uint64_t checksum = load_le<uint64_t>(data + kChecksumAt);
  const uint64_t actual = head_checksum(data, layout.chunks_begin());
  if (checksum != actual) return failure(Status::kBadChecksum, "header", checksum, actual);
  return {};
}

Failure check_zstd_chunk(const Chunk& chunk, int64_t weights, int64_t index) {
  if (chunk.filter.low_bits > kMaxLowBits || chunk.filter.low_bits % 2 != 0) {
    return failure(Status::kBadHeader, "low bits", kMaxLowBits, chunk.filter.low_bits, index);
  }
  const int64_t planes = chunk.filter.planes_nbytes(weights);
  const int64_t tail = int64_t{chunk.nbytes} - chunk.frame_nbytes - planes;
  const int64_t most = 4 * weights;
  if (tail < 0 || tail > most || tail % 4 != 0) {
    return failure(Status::kBadHeader, "frame and plane bytes", chunk.nbytes,
                   chunk.frame_nbytes + static_cast<uint64_t>(planes), index);
  }
  return {};
}

Failure check_packed_chunk(const Chunk& chunk, const Tile& tile, int64_t index) {
  if (chunk.width < kMinWidth || chunk.width > kMaxWidth) {
    return failure(Status::kBadHeader, "width", kMaxWidth, chunk.width, index);
  }
  const int64_t codes = kTableNbytes + chunk.codes_nbytes(tile);
  const int64_t tail = chunk.nbytes - codes - exception_counts_nbytes(tile);
  const bool valid = chunk.nbytes == codes || (tail > 0 && tail % kPackedExceptionNbytes == 0 &&
                                               tail <= kPackedExceptionNbytes * tile.weights());
  if (!valid || chunk.frame_nbytes != 0 || chunk.filter.pairs) {
    return failure(Status::kBadHeader, "packed chunk bytes", codes, chunk.nbytes, index);
  }
  return {};
}

Failure check_raw_chunk(const Chunk& chunk, int64_t weights, int64_t index) {
  if (chunk.nbytes == weights && chunk.frame_nbytes == 0 && chunk.filter.identity()) return {};
  return failure(Status::kBadHeader, "raw chunk bytes", weights, chunk.nbytes, index);
}

Failure check_chunk(const PayloadView& view, int64_t index, uint64_t expected_offset) {
  const Chunk chunk = view.chunk(index);
  const Tile tile = view.tile(index);
  if (chunk.offset != expected_offset) {
    return failure(Status::kBadHeader, "chunk offset", expected_offset, chunk.offset, index);
  }
  const uint64_t encoding = static_cast<uint64_t>(chunk.encoding);
  const uint64_t coded = static_cast<uint64_t>(view.layout().codec);  // they have the same values
  if (encoding != 0 && encoding != coded) {
    return failure(Status::kBadHeader, "chunk encoding", coded, encoding, index);
  }
  const uint8_t* entry = view.data() + kPayloadHeaderBytes + index * kChunkEntryBytes;
  const uint64_t reserved =
      load_le<uint64_t>(entry + kEncodingAt) >> (8 * (kPairsAt - kEncodingAt));
  if (reserved > 1) {
    return failure(Status::kBadHeader, "pairs and reserved bytes", 1, reserved, index);
  }
  switch (chunk.encoding) {
    case Encoding::kZstd: return check_zstd_chunk(chunk, tile.weights(), index);
    case Encoding::kPacked: return check_packed_chunk(chunk, tile, index);
    default: return check_raw_chunk(chunk, tile.weights(), index);
  }
}

Failure check_table(const PayloadView& view, size_t nbytes) {
  const PayloadLayout& layout = view.layout();
  uint64_t offset = layout.chunks_begin();
  for (int64_t i = 0; i < layout.num_chunks(); ++i) {
    if (Failure bad = check_chunk(view, i, offset); !bad.ok()) return bad;
    offset = view.chunk(i).extent_end();
    if (offset > nbytes) return failure(Status::kTruncated, "chunk end", offset, nbytes, i);
  }
  if (offset != nbytes) return failure(Status::kBadHeader, "payload bytes", offset, nbytes);
  return {};
}

}  // namespace

const char* codec_name(Codec codec) {
  switch (codec) {
    case Codec::kRaw: return "raw";
    case Codec::kZstd: return "zstd";
    case Codec::kPacked: return "packed";
  }
  return "unknown";
}

const char* encoding_name(Encoding encoding) { return codec_name(static_cast<Codec>(encoding)); }

int64_t Chunk::num_exceptions(const Tile& tile) const {
  if (encoding == Encoding::kZstd) {
    return (int64_t{nbytes} - frame_nbytes - filter.planes_nbytes(tile.weights())) / 4;
  }
  const int64_t tail = int64_t{nbytes} - kTableNbytes - codes_nbytes(tile);
  if (encoding == Encoding::kRaw || tail == 0) return 0;
  return (tail - exception_counts_nbytes(tile)) / kPackedExceptionNbytes;
}

Tile PayloadLayout::tile(int64_t chunk_index) const {
  const int64_t panel = chunk_index / num_slabs(), slab = chunk_index % num_slabs();
  Tile tile;
  tile.row = panel * panel_rows;
  tile.col = slab * slab_cols;
  tile.rows = tile.row + panel_rows <= rows ? panel_rows : rows - tile.row;
  tile.cols = tile.col + slab_cols <= cols ? slab_cols : cols - tile.col;
  return tile;
}

Failure PayloadView::parse(const uint8_t* data, size_t nbytes, PayloadView* view) {
  return parse_head(data, nbytes, nbytes, view);
}

Failure PayloadView::parse_head(const uint8_t* head, size_t head_nbytes, size_t nbytes,
                                PayloadView* view) {
  if (Failure bad = check_identity(head, head_nbytes); !bad.ok()) return bad;
  PayloadView parsed;
  parsed.head_ = head;
  parsed.data_ = head;
  if (Failure bad = read_layout(head, &parsed.layout_); !bad.ok()) return bad;
  if (Failure bad = check_sizes(head, head_nbytes, nbytes, parsed.layout_); !bad.ok()) return bad;
  if (Failure bad = check_table(parsed, nbytes); !bad.ok()) return bad;
  *view = parsed;
  return {};
}

PayloadView PayloadView::with_chunks(const uint8_t* chunk, uint64_t offset) const {
  PayloadView moved = *this;
  // As numbers: the payload's first byte may lie nowhere.
  moved.data_ = reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(chunk) - offset);
  return moved;
}

Chunk PayloadView::chunk(int64_t index) const {
  const uint8_t* entry = head_ + kPayloadHeaderBytes + index * kChunkEntryBytes;
  Chunk chunk;
  chunk.offset = load_le<uint64_t>(entry + kOffsetAt);
  chunk.nbytes = load_le<uint32_t>(entry + kStoredAt);
  chunk.frame_nbytes = load_le<uint32_t>(entry + kFrameAt);
  chunk.encoding = static_cast<Encoding>(entry[kEncodingAt]);
  (chunk.encoding == Encoding::kPacked ? chunk.width : chunk.filter.low_bits) = entry[kBitsAt];
  chunk.filter.pairs = entry[kPairsAt] != 0;
  chunk.checksum = load_le<uint64_t>(entry + kChunkChecksumAt);
  return chunk;
}

Failure PayloadView::verify_chunk(int64_t index) const {
  const Chunk entry = chunk(index);
  const uint64_t found = checksum64(data_ + entry.offset, entry.extent_end() - entry.offset);
  if (found == entry.checksum) return {};
  return failure(Status::kBadChecksum, "chunk", entry.checksum, found, index);
}

void write_payload_head(const PayloadLayout& layout, const Chunk* chunks, uint64_t nbytes,
                        uint8_t* dst) {
  std::memset(dst, 0, static_cast<size_t>(layout.chunks_begin()));
  std::memcpy(dst, kMagic, sizeof(kMagic));
  store_le<uint16_t>(dst + kVersionAt, kPayloadVersion);
  dst[kCodecAt] = static_cast<uint8_t>(layout.codec);
  store_le<int16_t>(dst + kLevelAt, layout.level);
  store_le<uint64_t>(dst + kRowsAt, layout.rows);
  store_le<uint64_t>(dst + kColsAt, layout.cols);
  store_le<uint32_t>(dst + kPanelRowsAt, static_cast<uint32_t>(layout.panel_rows));
  store_le<uint32_t>(dst + kSlabColsAt, static_cast<uint32_t>(layout.slab_cols));
  store_le<uint64_t>(dst + kNbytesAt, nbytes);
  store_le<uint32_t>(dst + kNumChunksAt, static_cast<uint32_t>(layout.num_chunks()));
  for (int64_t i = 0; i < layout.num_chunks(); ++i) {
    uint8_t* entry = dst + kPayloadHeaderBytes + i * kChunkEntryBytes;
    store_le<uint64_t>(entry + kOffsetAt, chunks[i].offset);
    store_le<uint32_t>(entry + kStoredAt, chunks[i].nbytes);
    store_le<uint32_t>(entry + kFrameAt, chunks[i].frame_nbytes);
    entry[kEncodingAt] = static_cast<uint8_t>(chunks[i].encoding);
    const bool packed = chunks[i].encoding == Encoding::kPacked;
    entry[kBitsAt] = static_cast<uint8_t>(packed ? chunks[i].width : chunks[i].filter.low_bits);
    entry[kPairsAt] = chunks[i].filter.pairs ? 1 : 0;
    store_le<uint64_t>(entry + kChunkChecksumAt, chunks[i].checksum);
  }
  store_le<uint64_t>(dst + kChecksumAt, head_checksum(dst, layout.chunks_begin()));
}

}  // namespace dcext
