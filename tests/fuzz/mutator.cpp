#include "mutator.h"

#define ZSTD_STATIC_LINKING_ONLY
#include <zstd.h>

#include <algorithm>

#include "codec/filter.h"
#include "codec/seek_index.h"
#include "payload_writer.h"

namespace dcext::fuzz {
namespace {

constexpr size_t kMostBytes = 40000;
constexpr int64_t kMostWeights = 140000;

// A payload taken apart.
struct Parts {
  PayloadLayout layout;
  std::vector<Chunk> chunks;
  std::vector<ByteVector> stored;

  explicit Parts(const PayloadView& view) : layout(view.layout()) {
    for (int64_t i = 0; i < layout.num_chunks(); ++i) {
      chunks.push_back(view.chunk(i));
      const uint8_t* src = view.data() + chunks.back().offset;
      stored.emplace_back(src, src + chunks.back().nbytes);
    }
  }
};

// Where the blocks of a frame begin: as far as their headers say, and where the last one ends.
std::vector<size_t> block_offsets(const ByteVector& frame) {
  std::vector<size_t> offsets;
  ZSTD_FrameHeader header;
  if (ZSTD_getFrameHeader(&header, frame.data(), frame.size()) != 0) return offsets;
  size_t offset = header.headerSize;
  while (offset + 3 <= frame.size()) {
    offsets.push_back(offset);
    const uint32_t block = frame[offset] | frame[offset + 1] << 8 | frame[offset + 2] << 16;
    offset += 3 + ((block >> 1 & 3) == 1 ? 1 : block >> 3);
    if (block & 1) break;
  }
  offsets.push_back(std::min(offset, frame.size()));
  return offsets;
}

class FrameMutator {
 public:
  FrameMutator(Random& random, ByteVector* frame) : random_(random), frame_(*frame) {}

  void mutate(const ByteVector& other) {
    switch (random_.below(9)) {
      case 0:
      case 1: return flip(random_place());
      case 2: return set(random_place());
      case 3: return insert_bytes();
      case 4: return erase_bytes();
      case 5: return change_block_header();
      case 6: return copy_within();
      case 7: return flip(near_block());
      default: return take_block(other);
    }
  }

 private:
  size_t random_place() { return random_.below(frame_.size() + 1); }

  // The header of a block and what comes first in it: sizes and trees.
  size_t near_block() {
    const std::vector<size_t> offsets = block_offsets(frame_);
    if (offsets.empty()) return random_place();
    return offsets[random_.below(offsets.size())] + random_.below(12);
  }

  void flip(size_t place) {
    if (place < frame_.size()) frame_[place] ^= static_cast<uint8_t>(1 << random_.below(8));
  }
  void set(size_t place) {
    if (place >= frame_.size()) return;
    frame_[place] = random_.one_in(2) ? random_.byte()
                                      : static_cast<uint8_t>(random_.pick({0, 1, 127, 128, 255}));
  }

  // Makes the block around `place` longer or shorter by what was inserted or erased.
  void resize_block(const std::vector<size_t>& offsets, size_t place, int64_t by) {
    for (size_t i = 0; i + 1 < offsets.size(); ++i) {
      if (place < offsets[i] + 3 || place > offsets[i + 1]) continue;
      add_to_header(offsets[i], by * 8);
      return;
    }
  }
  void add_to_header(size_t offset, int64_t value) {
    if (offset + 3 > frame_.size()) return;
    const int64_t header =
        (frame_[offset] | frame_[offset + 1] << 8 | frame_[offset + 2] << 16) + value;
    for (int i = 0; i < 3; ++i) frame_[offset + i] = static_cast<uint8_t>(header >> (8 * i));
  }

  void insert_bytes() {
    const size_t place = random_.one_in(2) ? random_place() : near_block();
    if (place > frame_.size()) return;
    const std::vector<size_t> offsets = block_offsets(frame_);
    const int64_t n = random_.pick({1, 1, 2, 3, 8, 40});
    ByteVector bytes(static_cast<size_t>(n), random_.byte());
    if (random_.one_in(2)) {
      for (uint8_t& byte : bytes) byte = random_.byte();
    }
    frame_.insert(frame_.begin() + static_cast<int64_t>(place), bytes.begin(), bytes.end());
    if (!random_.one_in(4)) resize_block(offsets, place, n);
  }
  void erase_bytes() {
    const size_t place = random_.one_in(2) ? random_place() : near_block();
    if (place >= frame_.size()) return;
    const std::vector<size_t> offsets = block_offsets(frame_);
    const auto most = static_cast<int64_t>(frame_.size() - place);
    const int64_t n = std::min(random_.one_in(8) ? most : random_.pick({1, 1, 2, 4, 16}), most);
    const auto first = frame_.begin() + static_cast<int64_t>(place);
    frame_.erase(first, first + n);
    if (!random_.one_in(4)) resize_block(offsets, place, -n);
  }
  void copy_within() {
    if (frame_.empty()) return;
    const size_t from = random_.below(frame_.size()), to = random_.below(frame_.size());
    const size_t n =
        std::min({size_t{1} + random_.below(16), frame_.size() - from, frame_.size() - to});
    std::copy_n(ByteVector(frame_).begin() + static_cast<int64_t>(from), n,
                frame_.begin() + static_cast<int64_t>(to));
  }
  void change_block_header() {
    const std::vector<size_t> offsets = block_offsets(frame_);
    if (offsets.empty()) return;
    const size_t offset = offsets[random_.below(offsets.size())];
    if (offset + 3 > frame_.size()) return;
    switch (random_.below(3)) {
      case 0: frame_[offset] ^= static_cast<uint8_t>(random_.pick({1, 2, 4, 6})); break;
      case 1: add_to_header(offset, random_.between(-3, 3) * 8); break;
      default: add_to_header(offset, static_cast<int64_t>(random_.below(1 << 21)) * 8); break;
    }
  }
  // A block of the other frame, before one of ours or in its place.
  void take_block(const ByteVector& other) {
    const std::vector<size_t> from = block_offsets(other), to = block_offsets(frame_);
    if (from.size() < 2 || to.size() < 2) return;
    const size_t i = random_.below(from.size() - 1), j = random_.below(to.size() - 1);
    ByteVector block(other.begin() + static_cast<int64_t>(from[i]),
                     other.begin() + static_cast<int64_t>(from[i + 1]));
    const auto begin = frame_.begin() + static_cast<int64_t>(to[j]);
    const bool replace = random_.one_in(2);
    const uint8_t is_last = replace ? frame_[to[j]] & 1 : 0;
    block[0] = static_cast<uint8_t>((block[0] & 254) | is_last);
    const auto end = replace ? frame_.begin() + static_cast<int64_t>(to[j + 1]) : begin;
    frame_.insert(frame_.erase(begin, end), block.begin(), block.end());
  }

  Random& random_;
  ByteVector& frame_;
};

// Planes and exceptions: as long as the head calls for, by cutting off or adding at random.
void fit_tail(Random& random, const Chunk& chunk, int64_t weights, ByteVector* tail) {
  const int64_t planes = chunk.filter.planes_nbytes(weights);
  const auto nbytes = static_cast<int64_t>(tail->size());
  int64_t exceptions = std::clamp<int64_t>((nbytes - planes) / 4, 0, weights);
  if (random.one_in(16)) exceptions = std::min(weights, exceptions + 1);
  const size_t before = tail->size();
  tail->resize(static_cast<size_t>(planes + 4 * exceptions));
  for (size_t i = before; i < tail->size(); ++i) (*tail)[i] = random.byte();
}

// A tile of another size; of payloads with one chunk only, where that is simple.
void change_tile(Random& random, Parts* parts) {
  PayloadLayout& layout = parts->layout;
  const int64_t weights = layout.rows * layout.cols;
  const int64_t wanted = random.one_in(4)   ? random.between(1, 3000)
                         : random.one_in(3) ? random.pick({1, 6, 128, 1024, 1025, 4096, 131072})
                                            : weights + random.between(-4, 4);
  layout.cols = std::clamp<int64_t>(wanted, 1, kMostWeights);
  layout.rows = 1;
  if (layout.cols % 2 == 0 && random.one_in(2)) {
    layout.cols /= 2;
    layout.rows = 2;
  }
  layout.panel_rows = layout.rows;
  layout.slab_cols = layout.cols;
}

void mutate_chunk(Random& random, Chunk* chunk, int64_t weights, const ByteVector& other,
                  ByteVector* stored) {
  ByteVector frame(stored->begin(), stored->begin() + chunk->frame_nbytes);
  ByteVector tail(stored->begin() + chunk->frame_nbytes, stored->end());
  switch (random.below(12)) {
    case 0:
      chunk->filter.pairs = random.one_in(2);
      chunk->filter.low_bits = static_cast<int>(random.pick({0, 2, 4}));
      break;
    case 1:
      if (!tail.empty()) tail[random.below(tail.size())] = random.byte();
      break;
    case 2:  // an exception twice, or one of the last
      if (tail.size() >= 8) std::copy_n(tail.end() - 4, 4, tail.end() - 8);
      break;
    default: FrameMutator(random, &frame).mutate(other);
  }
  fit_tail(random, *chunk, weights, &tail);
  chunk->frame_nbytes = static_cast<uint32_t>(frame.size());
  *stored = std::move(frame);
  stored->insert(stored->end(), tail.begin(), tail.end());
}

// A field of a block in the index, with what fields break at; or any byte of index or payload.
void add_patches(Random& random, std::vector<Patch>* patches) {
  if (patches->size() > 24) patches->clear();
  const uint32_t block = static_cast<uint32_t>(random.below(4)) * sizeof(SeekBlock);
  if (random.one_in(3)) {
    patches->push_back({static_cast<uint8_t>(random.below(4)), static_cast<uint32_t>(random.next()),
                        random.byte()});
    return;
  }
  struct Field {
    size_t offset, nbytes;
  };
  constexpr Field kFields[] = {
      {offsetof(SeekBlock, src), 8},           {offsetof(SeekBlock, planes), 8},
      {offsetof(SeekBlock, dst), 8},           {offsetof(SeekBlock, tile_cols), 4},
      {offsetof(SeekBlock, tile_weights), 4},  {offsetof(SeekBlock, first), 4},
      {offsetof(SeekBlock, size), 4},          {offsetof(SeekBlock, num_exceptions), 4},
      {offsetof(SeekBlock, stream_nbytes), 4}, {offsetof(SeekBlock, stream_nbytes) + 12, 4},
      {offsetof(SeekBlock, kind), 1},          {offsetof(SeekBlock, num_streams), 1},
      {offsetof(SeekBlock, table_log), 1},     {offsetof(SeekBlock, filter), 1},
      {offsetof(SeekBlock, weights), 1},       {offsetof(SeekBlock, segment_bits), 2}};
  const Field field = kFields[random.below(std::size(kFields))];
  const uint64_t value = static_cast<uint64_t>(
      random.one_in(4) ? static_cast<int64_t>(random.next() >> random.below(64))
                       : random.pick({0,
                                      1,
                                      2,
                                      3,
                                      4,
                                      5,
                                      6,
                                      7,
                                      -1,
                                      -2,
                                      -4,
                                      -64,
                                      64,
                                      1023,
                                      1024,
                                      1025,
                                      131072,
                                      0x7fffffff,
                                      int64_t{1} << 32,
                                      INT64_MIN}));
  const bool flip = random.one_in(3);
  for (size_t i = 0; i < field.nbytes; ++i) {
    patches->push_back({flip ? Patch::kFlipIndex : Patch::kSetIndex,
                        block + static_cast<uint32_t>(field.offset + i),
                        static_cast<uint8_t>(value >> (8 * i))});
  }
}

// Any frame of an input, or none.
ByteVector some_frame(Random& random, const FuzzInput& input) {
  PayloadView view;
  if (!PayloadView::parse(input.payload.data(), input.payload.size(), &view).ok()) return {};
  const auto n = static_cast<uint64_t>(view.layout().num_chunks());
  const Chunk chunk = view.chunk(static_cast<int64_t>(random.below(n)));
  const uint8_t* src = view.data() + chunk.offset;
  return {src, src + chunk.frame_nbytes};
}

}  // namespace

void mutate(Random& random, const FuzzInput& other, FuzzInput* input) {
  if (random.one_in(3)) return add_patches(random, &input->patches);
  if (random.one_in(8)) input->patches.clear();
  PayloadView view;
  if (!PayloadView::parse(input->payload.data(), input->payload.size(), &view).ok()) return;
  Parts parts(view);
  const auto index = static_cast<int64_t>(random.below(parts.chunks.size()));
  Chunk& chunk = parts.chunks[index];
  if (chunk.encoding != Encoding::kZstd) return;
  if (parts.chunks.size() == 1 && random.one_in(6)) change_tile(random, &parts);
  const int64_t weights = parts.layout.tile(index).weights();
  mutate_chunk(random, &chunk, weights, some_frame(random, other), &parts.stored[index]);
  if (parts.stored[index].size() > kMostBytes) return;
  input->payload = assemble_payload(parts.layout, parts.chunks, parts.stored);
}

}  // namespace dcext::fuzz
