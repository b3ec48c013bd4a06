#include "codec/payload_decoder.h"

#include <algorithm>
#include <mutex>

#include "base/scratch.h"
#include "codec/filter.h"
#include "codec/packed.h"
#include "codec/zstd_frame.h"

namespace dcext {
namespace {

// Frame, planes and exceptions of one tile. Without `pairs` the frame is decoded in place.
Status decode_zstd(const uint8_t* src, const Chunk& chunk, const Tile& tile, int8_t* dst,
                   int64_t dst_capacity) {
  thread_local Scratch pairs_scratch;
  const Filter& filter = chunk.filter;
  const int64_t weights = tile.weights(), num_exceptions = chunk.num_exceptions(tile);
  const int64_t highs_nbytes = filtered_nbytes(filter, weights);
  uint8_t* highs = reinterpret_cast<uint8_t*>(dst);
  if (filter.pairs) {
    dst_capacity = highs_nbytes + kFrameSlack;
    highs = pairs_scratch.reserve(dst_capacity);
    if (highs == nullptr) return Status::kOutOfMemory;
  }
  const Status status =
      decode_frame(src, chunk.frame_nbytes, highs, static_cast<size_t>(highs_nbytes),
                   static_cast<size_t>(dst_capacity));
  if (status != Status::kOk) return status;
  const uint8_t* planes = src + chunk.frame_nbytes;
  undo_filter(filter, highs, planes, weights, dst);
  const uint8_t* exceptions = planes + filter.planes_nbytes(weights);
  const bool valid = apply_exceptions(exceptions, num_exceptions, weights, dst);
  return valid ? Status::kOk : Status::kCorrupt;
}

void copy_rows(const int8_t* src, int64_t ld_src, int64_t rows, int64_t cols, int8_t* dst,
               int64_t ld_dst) {
  if (ld_src == cols && ld_dst == cols) {
    std::memcpy(dst, src, static_cast<size_t>(rows * cols));
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(dst + r * ld_dst, src + r * ld_src, static_cast<size_t>(cols));
  }
}

// The part of `region` inside chunk `index`: decoded in place where the whole tile is wanted and lies in one piece,
// else through this thread's scratch. `in_order`: everything behind the tile's place is written later.
Failure decode_tile(const PayloadView& view, int64_t index, const Region& region, Verify verify,
                    int8_t* dst, int64_t ld_dst, bool in_order) {
  const Tile tile = view.tile(index);
  const int64_t row_begin = std::max(tile.row, region.row_begin);
  const int64_t row_end = std::min(tile.row + tile.rows, region.row_end);
  const int64_t col_begin = std::max(tile.col, region.col_begin);
  const int64_t col_end = std::min(tile.col + tile.cols, region.col_end);
  const int64_t rows = row_end - row_begin, cols = col_end - col_begin;
  int8_t* out = dst + (row_begin - region.row_begin) * ld_dst + (col_begin - region.col_begin);
  const bool whole = rows == tile.rows && cols == tile.cols;
  const bool in_one_piece = ld_dst == cols || rows == 1;
  if (whole && in_one_piece) {
    const int64_t rest = (region.row_end - row_begin) * cols;
    return decode_chunk(view, index, verify, out, in_order ? rest : tile.weights());
  }

  const int8_t* src = nullptr;
  const Chunk chunk = view.chunk(index);
  if (chunk.encoding == Encoding::kRaw) {
    if (verify == Verify::kYes) {
      if (Failure bad = view.verify_chunk(index); !bad.ok()) return bad;
    }
    src = reinterpret_cast<const int8_t*>(view.data() + chunk.offset);
  } else {
    thread_local Scratch tile_scratch;
    const int64_t capacity = tile.weights() + kFrameSlack;
    int8_t* decoded = reinterpret_cast<int8_t*>(tile_scratch.reserve(capacity));
    if (decoded == nullptr) {
      return Failure{Status::kOutOfMemory, "tile", index, static_cast<uint64_t>(capacity), 0};
    }
    if (Failure bad = decode_chunk(view, index, verify, decoded, capacity); !bad.ok()) return bad;
    src = decoded;
  }
  copy_rows(src + (row_begin - tile.row) * tile.cols + (col_begin - tile.col), tile.cols, rows,
            cols, out, ld_dst);
  return {};
}

}  // namespace

Failure decode_chunk(const PayloadView& view, int64_t index, Verify verify, int8_t* dst,
                     int64_t dst_capacity) {
  const Chunk chunk = view.chunk(index);
  const Tile tile = view.tile(index);
  const uint8_t* src = view.data() + chunk.offset;
  Status status = Status::kOk;
  switch (chunk.encoding) {
    case Encoding::kRaw: std::memcpy(dst, src, static_cast<size_t>(tile.weights())); break;
    case Encoding::kZstd: status = decode_zstd(src, chunk, tile, dst, dst_capacity); break;
    case Encoding::kPacked:
      if (!decode_packed(packed_tile(view, index), dst, tile.cols)) status = Status::kCorrupt;
      break;
  }
  // After decoding, which is safe on any bytes: now they are in the cache, and hashing them is nearly free.
  if (verify == Verify::kYes) {
    if (Failure bad = view.verify_chunk(index); !bad.ok()) return bad;
  }
  if (status == Status::kOk) return {};
  return Failure{status, "decoded bytes", index, static_cast<uint64_t>(tile.weights()), 0};
}

Failure verify_chunk(const PayloadView& view, int64_t index) {
  if (Failure bad = view.verify_chunk(index); !bad.ok()) return bad;
  return check_format(view, index);
}

// Zstd frames are checked whenever they are decoded, which is the only use that layers make of them.
Failure check_format(const PayloadView& view, int64_t index) {
  if (view.chunk(index).encoding != Encoding::kPacked || check_packed(packed_tile(view, index))) {
    return {};
  }
  return Failure{Status::kCorrupt, "table or exceptions", index, 0, 0};
}

FormatChecks::FormatChecks(int64_t num_chunks)
    : passed_(new std::atomic<bool>[static_cast<size_t>(num_chunks)]()) {}

Failure FormatChecks::check(const PayloadView& view, int64_t index) {
  std::atomic<bool>& passed = passed_[static_cast<size_t>(index)];
  if (passed.load(std::memory_order_relaxed)) return {};
  const Failure bad = check_format(view, index);
  if (bad.ok()) passed.store(true, std::memory_order_relaxed);
  return bad;
}

Failure decode_region(const PayloadView& view, const Region& region, Verify verify, int8_t* dst,
                      int64_t ld_dst, Executor& executor) {
  const PayloadLayout& layout = view.layout();
  const int64_t first_panel = region.row_begin / layout.panel_rows;
  const int64_t first_slab = region.col_begin / layout.slab_cols;
  const int64_t panels = ceil_div(region.row_end, layout.panel_rows) - first_panel;
  const int64_t slabs = ceil_div(region.col_end, layout.slab_cols) - first_slab;
  // One worker writes full-width tiles in order, so each may spill into the next one's place.
  const bool in_order = executor.num_workers() == 1 && layout.num_slabs() == 1 &&
                        region.cols() == layout.cols && ld_dst == layout.cols;
  std::mutex mutex;
  Failure first;
  executor.run(panels * slabs, [&](int64_t task, int) {
    const int64_t panel = first_panel + task / slabs, slab = first_slab + task % slabs;
    const int64_t index = panel * layout.num_slabs() + slab;
    const Failure bad = decode_tile(view, index, region, verify, dst, ld_dst, in_order);
    if (bad.ok()) return;
    const std::lock_guard<std::mutex> lock(mutex);
    if (first.ok() || bad.chunk < first.chunk) first = bad;
  });
  return first;
}

}  // namespace dcext
