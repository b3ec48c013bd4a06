#include "payload_writer.h"

#define ZSTD_STATIC_LINKING_ONLY
#include <zstd.h>

#include <algorithm>

#include "base/checksum.h"
#include "codec/filter.h"

namespace dcext::fuzz {
namespace {

using Outside = FrameWriter::Outside;

// One tile in the making.
struct TileDraft {
  Chunk chunk;
  ByteVector stored, content;
};

class PayloadWriter {
 public:
  PayloadWriter(Random& random, VariantCounts& counts)
      : random_(random), counts_(counts), frames_(random, counts) {}

  RandomPayload write();

 private:
  PayloadLayout random_layout();
  void add_chunk(const Tile& tile, bool outside);
  void add_raw_chunk(const Tile& tile);
  void add_outside_frame(int64_t nbytes, TileDraft* draft);
  void write_zstd_frame(int64_t nbytes, bool checksum, TileDraft* draft);
  void add_exceptions(const Tile& tile, bool repeat, ByteVector* list);
  void place(const Tile& tile, const std::vector<int8_t>& weights);

  Random& random_;
  VariantCounts& counts_;
  FrameWriter frames_;
  RandomPayload payload_;
  PayloadLayout layout_;
  std::vector<Chunk> chunks_;
  std::vector<ByteVector> stored_;
};

// Mostly small, so that many fit in a minute; now and then with blocks of the largest size.
PayloadLayout PayloadWriter::random_layout() {
  int64_t weights = random_.between(1, 500);
  if (random_.one_in(4)) {
    weights = random_.pick({1, 5, 6, 7, 9, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025});
  }
  if (random_.one_in(16)) weights = random_.pick({4095, 4096, 4097, 8191, 8192, 8193, 10000});
  if (random_.one_in(64)) weights = random_.between(1, 40000);
  if (random_.one_in(250)) weights = random_.pick({131071, 131072, 131073, 262144, 300001});
  PayloadLayout layout;
  layout.codec = random_.one_in(100) ? Codec::kRaw : Codec::kZstd;
  layout.cols = random_.one_in(2) ? weights : random_.between(1, std::min<int64_t>(weights, 400));
  if (random_.one_in(12)) layout.cols = 1;
  layout.rows = std::max<int64_t>(1, weights / layout.cols);
  layout.panel_rows = layout.rows;
  layout.slab_cols = layout.cols;
  if (random_.one_in(4)) layout.panel_rows = random_.between((layout.rows + 3) / 4, layout.rows);
  if (random_.one_in(3)) layout.slab_cols = random_.between((layout.cols + 3) / 4, layout.cols);
  counts_.add(layout.num_chunks() == 1 ? Variant::kTileWhole
              : layout.num_slabs() > 1 ? Variant::kTileSlabs
                                       : Variant::kTilePanels);
  if (layout.slab_cols % 2 != 0) counts_.add(Variant::kTileOddCols);
  return layout;
}

void PayloadWriter::add_raw_chunk(const Tile& tile) {
  TileDraft draft;
  std::vector<int8_t> weights(static_cast<size_t>(tile.weights()));
  for (int8_t& weight : weights) weight = static_cast<int8_t>(random_.byte());
  place(tile, weights);
  chunks_.push_back(draft.chunk);
  stored_.emplace_back(weights.begin(), weights.end());
  counts_.add(Variant::kRawChunk);
}

void PayloadWriter::write_zstd_frame(int64_t nbytes, bool checksum, TileDraft* draft) {
  const ByteVector period{1, 2, 3, 4, 5, 250, 251, random_.byte(), random_.byte()};
  for (int64_t i = 0; i < nbytes; ++i) {
    draft->content.push_back(checksum ? random_.byte() : period[i % period.size()]);
  }
  draft->stored.resize(ZSTD_compressBound(static_cast<size_t>(nbytes)));
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, 3);
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, checksum ? 1 : 0);
  draft->stored.resize(ZSTD_compress2(context, draft->stored.data(), draft->stored.size(),
                                      draft->content.data(), draft->content.size()));
  ZSTD_freeCCtx(context);
}

void PayloadWriter::add_outside_frame(int64_t nbytes, TileDraft* draft) {
  constexpr int kKinds = 7;
  const int kind = static_cast<int>(random_.below(kKinds));
  bool outside = true;
  if (kind == 0 && nbytes >= 200) {
    write_zstd_frame(nbytes, false, draft);
  } else if (kind == 1) {
    write_zstd_frame(nbytes, true, draft);
  } else if (kind == 2 && nbytes >= 2) {
    const int64_t first = random_.between(1, nbytes - 1);
    frames_.write(first, Outside::kNot, &draft->stored, &draft->content);
    frames_.write(nbytes - first, Outside::kNot, &draft->stored, &draft->content);
  } else if (kind == 3) {
    draft->stored = {0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 1, 2};
    frames_.write(nbytes, Outside::kNot, &draft->stored, &draft->content);
  } else {
    const Outside how = kind == 4   ? Outside::kDictionaryId
                        : kind == 5 ? Outside::kTwelveBits
                                    : Outside::kLongSequenceCount;
    outside =
        frames_.write(nbytes, kind < 4 ? Outside::kNot : how, &draft->stored, &draft->content) &&
        kind >= 4;
    payload_.decodable &= !outside || kind != 4;
  }
  if (outside) counts_.add(Variant::kOutsideSequences, kind);
  payload_.outside |= outside;
}

// Up to 20 distinct places, or all of a small tile; `repeat`: and one of them again.
void PayloadWriter::add_exceptions(const Tile& tile, bool repeat, ByteVector* list) {
  std::vector<uint32_t> places;
  const int64_t n = tile.weights();
  const bool everywhere = n <= 300 && random_.one_in(30);
  if (everywhere) {
    for (int64_t i = 0; i < n; ++i) places.push_back(static_cast<uint32_t>(i));
  } else if (repeat || random_.one_in(2)) {
    const int64_t count = random_.between(1, std::min<int64_t>(n, 20));
    for (int64_t i = 0; i < count; ++i) {
      places.push_back(static_cast<uint32_t>(random_.below(static_cast<uint64_t>(n))));
    }
    std::sort(places.begin(), places.end());
    places.erase(std::unique(places.begin(), places.end()), places.end());
  }
  const bool unordered = places.size() > 1 && random_.one_in(3);
  if (unordered) std::reverse(places.begin(), places.end());
  if (repeat && static_cast<int64_t>(places.size()) < n) {
    places.push_back(places[random_.below(places.size())]);
    counts_.add(Variant::kOutsideRepeatedException);
    payload_.outside = true;
  }
  counts_.add(places.empty() ? Variant::kExceptionsNone
              : unordered    ? Variant::kExceptionsUnordered
                             : Variant::kExceptionsAscending);
  if (everywhere) counts_.add(Variant::kExceptionsEverywhere);
  for (const uint32_t place : places) {
    for (const uint32_t byte : {uint32_t{random_.byte()}, place, place >> 8, place >> 16}) {
      list->push_back(static_cast<uint8_t>(byte));
    }
  }
}

void PayloadWriter::add_chunk(const Tile& tile, bool outside) {
  if (layout_.codec == Codec::kRaw || random_.one_in(30)) return add_raw_chunk(tile);
  TileDraft draft;
  Chunk& chunk = draft.chunk;
  chunk.encoding = Encoding::kZstd;
  const int filter = static_cast<int>(random_.below(6));
  chunk.filter.pairs = filter % 2 == 1;
  chunk.filter.low_bits = filter / 2 * 2;
  counts_.add(Variant::kFilterNone, filter);
  const int64_t n = tile.weights(), nbytes = filtered_nbytes(chunk.filter, n);
  const bool repeat = outside && random_.one_in(4);
  if (outside && !repeat) {
    add_outside_frame(nbytes, &draft);
  } else {
    frames_.write(nbytes, Outside::kNot, &draft.stored, &draft.content);
  }
  ++payload_.num_frames;
  chunk.frame_nbytes = static_cast<uint32_t>(draft.stored.size());
  ByteVector planes(static_cast<size_t>(chunk.filter.planes_nbytes(n))), list;
  for (uint8_t& byte : planes) byte = random_.byte();
  add_exceptions(tile, repeat, &list);

  std::vector<int8_t> weights(draft.content.begin(), draft.content.end());
  if (!chunk.filter.identity()) {
    weights.assign(static_cast<size_t>(n), 0);
    undo_filter(chunk.filter, draft.content.data(), planes.data(), n, weights.data());
  }
  apply_exceptions(list.data(), static_cast<int64_t>(list.size()) / 4, n, weights.data());
  place(tile, weights);
  draft.stored.insert(draft.stored.end(), planes.begin(), planes.end());
  draft.stored.insert(draft.stored.end(), list.begin(), list.end());
  chunks_.push_back(chunk);
  stored_.push_back(std::move(draft.stored));
}

void PayloadWriter::place(const Tile& tile, const std::vector<int8_t>& weights) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    std::copy_n(weights.begin() + r * tile.cols, tile.cols,
                payload_.matrix.begin() + (tile.row + r) * layout_.cols + tile.col);
  }
}

RandomPayload PayloadWriter::write() {
  layout_ = random_layout();
  payload_.matrix.resize(static_cast<size_t>(layout_.rows * layout_.cols));
  const bool outside = random_.one_in(50);
  for (int64_t i = 0; i < layout_.num_chunks(); ++i) add_chunk(layout_.tile(i), outside);
  if (layout_.codec == Codec::kRaw) counts_.add(Variant::kRawPayload);
  payload_.bytes = assemble_payload(layout_, chunks_, stored_);
  return std::move(payload_);
}

}  // namespace

ByteVector assemble_payload(const PayloadLayout& layout, std::vector<Chunk> chunks,
                            const std::vector<ByteVector>& stored) {
  ByteVector bytes(static_cast<size_t>(layout.chunks_begin()));
  for (size_t i = 0; i < chunks.size(); ++i) {
    Chunk& chunk = chunks[i];
    chunk.offset = bytes.size();
    chunk.nbytes = static_cast<uint32_t>(stored[i].size());
    bytes.insert(bytes.end(), stored[i].begin(), stored[i].end());
    bytes.resize(static_cast<size_t>(chunk.extent_end()));
    chunk.checksum = checksum64(bytes.data() + chunk.offset, bytes.size() - chunk.offset);
  }
  write_payload_head(layout, chunks.data(), bytes.size(), bytes.data());
  return bytes;
}

RandomPayload random_payload(Random& random, VariantCounts& counts) {
  return PayloadWriter(random, counts).write();
}

}  // namespace dcext::fuzz
