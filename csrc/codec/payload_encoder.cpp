#include "codec/payload_encoder.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "base/checksum.h"
#include "codec/filter.h"
#include "codec/packed.h"
#include "codec/zstd_frame.h"

namespace dcext {
namespace {

// Decoded weights per nanosecond and core on tiles of 3.6 bits, of one AVX-512 server. Only their ratios matter.
constexpr double kLiteralsSpeed = 2.8, kLevel3Speed = 0.9, kLevel19Speed = 2.4;
constexpr double kSizePerSlowdown = 0.1;  // twice the decode time is worth a tenth of the size
constexpr double kPairsCharge = 0.999;    // pairs decode faster: worth a thousandth of the size
constexpr double kEstimateMargin = 1.01;  // a filter whose lower bound is this far off is not tried

// All that ever win. Single highs with four low bits lose to pairs, odd numbers of low bits to even ones.
constexpr Filter kFilters[] = {{false, 0}, {true, 0}, {false, 2}, {true, 2}, {true, 4}};

struct EncodedChunk {
  std::vector<uint8_t> bytes;  // empty: the tile is stored raw
  size_t frame_nbytes = 0;
  Encoding encoding = Encoding::kRaw;
  Filter filter;
  int width = 0;
};

// Work space of one worker.
struct Workspace {
  explicit Workspace(int level) : encoder(level) {}
  FrameEncoder encoder;
  std::vector<int8_t> tile;
  std::vector<uint8_t> highs, planes;
  std::vector<FilterException> exceptions;
};

// The tile in one piece: in place where it is, else gathered.
const int8_t* gather_tile(const int8_t* qweight, const PayloadLayout& layout, const Tile& tile,
                          std::vector<int8_t>* storage) {
  const int8_t* src = qweight + tile.row * layout.cols + tile.col;
  if (tile.cols == layout.cols) return src;
  storage->resize(static_cast<size_t>(tile.weights()));
  for (int64_t r = 0; r < tile.rows; ++r) {
    std::memcpy(storage->data() + r * tile.cols, src + r * layout.cols,
                static_cast<size_t>(tile.cols));
  }
  return storage->data();
}

Status encode_frame(const uint8_t* src, size_t n, Workspace* work, EncodedChunk* out) {
  out->bytes.resize(frame_bound(n));
  const Status status =
      work->encoder.encode(src, n, out->bytes.data(), out->bytes.size(), &out->frame_nbytes);
  if (status != Status::kOk) return status;
  out->bytes.resize(out->frame_nbytes);
  out->encoding = Encoding::kZstd;
  return Status::kOk;
}

// Frame, planes and exceptions of one tile under one filter.
Status encode_filtered(const int8_t* src, int64_t n, const Filter& filter, Workspace* work,
                       EncodedChunk* out) {
  work->exceptions.clear();
  work->highs.resize(static_cast<size_t>(filtered_nbytes(filter, n)));
  work->planes.resize(static_cast<size_t>(filter.planes_nbytes(n)));
  apply_filter(filter, src, n, work->highs.data(), work->planes.data(), &work->exceptions);
  const Status status = encode_frame(work->highs.data(), work->highs.size(), work, out);
  if (status != Status::kOk) return status;
  out->filter = filter;
  out->bytes.insert(out->bytes.end(), work->planes.begin(), work->planes.end());
  const uint8_t* exceptions = reinterpret_cast<const uint8_t*>(work->exceptions.data());
  out->bytes.insert(out->bytes.end(), exceptions, exceptions + 4 * work->exceptions.size());
  return Status::kOk;
}

uint32_t stored_nbytes(const EncodedChunk& encoded, const Tile& tile) {
  return static_cast<uint32_t>(encoded.encoding == Encoding::kRaw ? tile.weights()
                                                                  : encoded.bytes.size());
}

// Literals only: every filter that may be the best one is tried, and the smallest result kept.
Status encode_literals(const int8_t* src, int64_t n, Workspace* work, EncodedChunk* out) {
  int64_t counts[256] = {};
  for (int64_t i = 0; i < n; ++i) ++counts[static_cast<uint8_t>(src[i])];
  double least = 8.0;
  for (const Filter& filter : kFilters) least = std::min(least, estimate_bits(filter, counts));
  double best = 0;
  for (const Filter& filter : kFilters) {
    if (estimate_bits(filter, counts) > least * kEstimateMargin) continue;
    EncodedChunk candidate;
    const Status status = encode_filtered(src, n, filter, work, &candidate);
    if (status != Status::kOk) return status;
    const double charged =
        static_cast<double>(candidate.bytes.size()) * (filter.pairs ? kPairsCharge : 1.0);
    if (out->bytes.empty() || charged < best) {
      best = charged;
      *out = std::move(candidate);
    }
  }
  return Status::kOk;
}

Status encode_tile(const int8_t* src, int64_t n, int level, Workspace* work, EncodedChunk* out) {
  const Status status = level == kLiteralsOnly ? encode_literals(src, n, work, out)
                                               : encode_frame(reinterpret_cast<const uint8_t*>(src),
                                                              static_cast<size_t>(n), work, out);
  if (status != Status::kOk) return status;
  if (static_cast<double>(out->bytes.size()) > kRawThreshold * static_cast<double>(n)) {
    *out = EncodedChunk{};
  }
  return Status::kOk;
}

// `src` is the tile where it lies in the matrix.
void pack_tile(const int8_t* src, int64_t ld, const Tile& tile, EncodedChunk* out) {
  int64_t counts[256] = {};
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t c = 0; c < tile.cols; ++c) ++counts[static_cast<uint8_t>(src[r * ld + c])];
  }
  int8_t table[kTableNbytes];
  out->width = choose_width(tile, counts, table);
  if (out->width == 0) return;
  out->encoding = Encoding::kPacked;
  encode_packed(src, ld, tile, out->width, table, &out->bytes);
}

// Encodes the tiles named by `indices` on the executor's threads.
Status encode_tiles(const int8_t* qweight, const PayloadLayout& layout, int level,
                    const std::vector<int64_t>& indices, Executor& executor,
                    std::vector<EncodedChunk>* chunks) {
  chunks->assign(indices.size(), {});
  std::vector<std::unique_ptr<Workspace>> workspaces(executor.num_workers());
  std::atomic<Status> first{Status::kOk};
  const auto encode_one = [&](int64_t i, int worker) {
    if (layout.codec == Codec::kPacked) {
      const Tile tile = layout.tile(indices[i]);
      pack_tile(qweight + tile.row * layout.cols + tile.col, layout.cols, tile, &(*chunks)[i]);
      return Status::kOk;
    }
    std::unique_ptr<Workspace>& work = workspaces[worker];
    if (work == nullptr) work = std::make_unique<Workspace>(level);
    const Tile tile = layout.tile(indices[i]);
    const int8_t* src = gather_tile(qweight, layout, tile, &work->tile);
    return encode_tile(src, tile.weights(), level, work.get(), &(*chunks)[i]);
  };
  executor.run(static_cast<int64_t>(indices.size()), [&](int64_t i, int worker) {
    Status status = Status::kOutOfMemory;
    try {
      status = encode_one(i, worker);
    } catch (const std::bad_alloc&) {  // must not leave a worker
    }
    if (status != Status::kOk) first = status;
  });
  return first;
}

uint64_t total_nbytes(const std::vector<EncodedChunk>& chunks, const PayloadLayout& layout,
                      const std::vector<int64_t>& indices) {
  uint64_t total = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    total += stored_nbytes(chunks[i], layout.tile(indices[i]));
  }
  return total;
}

std::vector<int64_t> sample_tiles(const PayloadLayout& layout) {
  constexpr int64_t kSamples = 8;
  const int64_t n = layout.num_chunks(), count = std::min(n, kSamples);
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < count; ++i) indices.push_back(i * n / count);
  return indices;
}

double charged_size(uint64_t nbytes, double speed) {
  return static_cast<double>(nbytes) * (1.0 + kSizePerSlowdown * (kLiteralsSpeed / speed - 1.0));
}

// Copies one encoded tile to its extent, pads it with zeros, and completes its table entry.
void place_chunk(const int8_t* qweight, const PayloadLayout& layout, const Tile& tile,
                 const EncodedChunk& encoded, uint8_t* payload, Chunk* chunk) {
  uint8_t* dst = payload + chunk->offset;
  if (encoded.encoding == Encoding::kRaw) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      std::memcpy(dst + r * tile.cols, qweight + (tile.row + r) * layout.cols + tile.col,
                  static_cast<size_t>(tile.cols));
    }
  } else {
    std::memcpy(dst, encoded.bytes.data(), encoded.bytes.size());
  }
  const uint64_t extent = chunk->extent_end() - chunk->offset;
  std::memset(dst + chunk->nbytes, 0, static_cast<size_t>(extent - chunk->nbytes));
  chunk->checksum = checksum64(dst, static_cast<size_t>(extent));
}

}  // namespace

Status choose_codec(const int8_t* qweight, int64_t rows, int64_t cols, Executor& executor,
                    CodecChoice* choice) {
  const PayloadLayout layout = plan_layout(rows, cols, 0, {Codec::kZstd, kLiteralsOnly});
  const std::vector<int64_t> sample = sample_tiles(layout);
  uint64_t raw_nbytes = 0;
  for (const int64_t index : sample) raw_nbytes += layout.tile(index).weights();
  struct Variant {
    int level;
    double speed;
  };
  double best = kRawThreshold * static_cast<double>(raw_nbytes);
  uint64_t literals_nbytes = 0;
  *choice = {Codec::kRaw, kLiteralsOnly};
  for (const Variant& variant : {Variant{kLiteralsOnly, kLiteralsSpeed}, Variant{3, kLevel3Speed},
                                 Variant{19, kLevel19Speed}}) {
    std::vector<EncodedChunk> chunks;
    const Status status = encode_tiles(qweight, layout, variant.level, sample, executor, &chunks);
    if (status != Status::kOk) return status;
    const uint64_t nbytes = total_nbytes(chunks, layout, sample);
    const double size = charged_size(nbytes, variant.speed);
    if (size < best) {
      best = size;
      *choice = {Codec::kZstd, variant.level};
    }
    if (variant.level == kLiteralsOnly) literals_nbytes = nbytes;
    if (variant.level == 3 && nbytes >= literals_nbytes) break;  // no repeats: level 19 finds none
  }
  return Status::kOk;
}

PayloadLayout plan_layout(int64_t rows, int64_t cols, int64_t slab_cols,
                          const CodecChoice& choice) {
  constexpr int64_t kTile = int64_t{256} << 10, kPackedTile = int64_t{128} << 10;
  constexpr int64_t kRowMultiple = 16;
  const bool packed = choice.codec == Codec::kPacked;
  PayloadLayout layout;
  layout.codec = choice.codec;
  layout.level = static_cast<int16_t>(choice.codec == Codec::kZstd ? choice.level : 0);
  layout.rows = rows;
  layout.cols = cols;
  const int64_t most_cols = packed ? kMaxPackedCols : kMaxTileWeights;
  layout.slab_cols = std::min({slab_cols == 0 ? cols : slab_cols, cols, most_cols});
  const int64_t fewest_rows = packed ? std::min(kBlockRows, rows) : 1;
  const int64_t most_rows =
      std::clamp<int64_t>((packed ? kPackedTile : kTile) / layout.slab_cols, fewest_rows, rows);
  const int64_t panels = ceil_div(rows, most_rows);
  int64_t panel_rows = ceil_div(rows, panels);
  if (packed || panel_rows > kRowMultiple) panel_rows = align_up(panel_rows, kRowMultiple);
  layout.panel_rows = std::min(panel_rows, rows);
  return layout;
}

Status encode_payload(const int8_t* qweight, const PayloadLayout& layout, Executor& executor,
                      FunctionRef<uint8_t*(uint64_t nbytes)> allocate) {
  const int64_t n = layout.num_chunks();
  std::vector<int64_t> all(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) all[i] = i;
  std::vector<EncodedChunk> encoded(static_cast<size_t>(n));
  if (layout.codec != Codec::kRaw) {
    const Status status = encode_tiles(qweight, layout, layout.level, all, executor, &encoded);
    if (status != Status::kOk) return status;
  }
  std::vector<Chunk> chunks(static_cast<size_t>(n));
  uint64_t offset = layout.chunks_begin();
  for (int64_t i = 0; i < n; ++i) {
    chunks[i].offset = offset;
    chunks[i].nbytes = stored_nbytes(encoded[i], layout.tile(i));
    chunks[i].frame_nbytes = static_cast<uint32_t>(encoded[i].frame_nbytes);
    chunks[i].encoding = encoded[i].encoding;
    chunks[i].filter = encoded[i].filter;
    chunks[i].width = encoded[i].width;
    offset = chunks[i].extent_end();
  }
  uint8_t* payload = allocate(offset);
  if (payload == nullptr) return Status::kOutOfMemory;
  executor.run(n, [&](int64_t i, int) {
    place_chunk(qweight, layout, layout.tile(i), encoded[i], payload, &chunks[i]);
  });
  write_payload_head(layout, chunks.data(), offset, payload);
  return Status::kOk;
}

}  // namespace dcext
