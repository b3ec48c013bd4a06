#include "codec/seek_index.h"

#define ZSTD_STATIC_LINKING_ONLY  // ZSTD_getFrameHeader
#include <zstd.h>
extern "C" {
#include <common/huf.h>  // HUF_readStats; internal to the pinned libzstd
}

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "base/bytes.h"
#include "codec/filter.h"

namespace dcext {
namespace {

// A cursor over stored bytes that knows where they end.
struct Bytes {
  const uint8_t* data;
  size_t nbytes;

  void skip(size_t n) {
    data += n;
    nbytes -= n;
  }
};

// What the next bits hold: how many whole codes << 8 | the bits of these codes.
using Step = uint16_t;

// The table of the last block that had one; treeless blocks use it again.
struct Tree {
  bool valid = false;
  int table_log = 0;
  int max_count = 0;  ///< most codes of a step
  uint8_t weights[kNumSymbols] = {};
  uint8_t lengths[1 << kMaxTableLog];  ///< of the code that an entry begins with
  Step steps[2 << kMaxTableLog];       ///< of the 2^v values of v bits, from 2^v on
};

void fill_lengths(Tree* tree) {
  int entry = 0;
  for (int weight = 1; weight <= tree->table_log; ++weight) {
    for (int symbol = 0; symbol < kNumSymbols; ++symbol) {
      if (tree->weights[symbol] != weight) continue;
      const int span = 1 << (weight - 1);
      std::memset(tree->lengths + entry, tree->table_log + 1 - weight, span);
      entry += span;
    }
  }
}

// A code, and then what the bits behind it hold.
void fill_steps(Tree* tree) {
  const int table_log = tree->table_log;
  tree->steps[1] = 0;
  for (int v = 1; v <= table_log; ++v) {
    for (int value = 0; value < 1 << v; ++value) {
      const int length = tree->lengths[value << (table_log - v)];
      const int rest = v - length;
      Step step = 0;
      if (rest >= 0) {
        step = tree->steps[(1 << rest) + (value & ((1 << rest) - 1))];
        step = static_cast<Step>(step + (1 << 8 | length));
      }
      tree->steps[(1 << v) + value] = step;
    }
  }
  tree->max_count = table_log / tree->lengths[(1 << table_log) - 1];  // the shortest code is last
}

// Reads a Huffman tree description and steps over it. Codes of 12 bits, which zstd's decoder takes and RFC 8878 does
// not allow, are left to it.
SeekResult read_tree(Bytes* src, Tree* tree) {
  uint8_t weights[kNumSymbols];
  unsigned ranks[HUF_TABLELOG_MAX + 1], num_symbols = 0, table_log = 0;
  const size_t read = HUF_readStats(weights, sizeof(weights), ranks, &num_symbols, &table_log,
                                    src->data, src->nbytes);
  if (ZSTD_isError(read)) return SeekResult::kCorrupt;
  src->skip(read);
  if (table_log > kMaxTableLog) return SeekResult::kOutsideProfile;
  *tree = {};
  std::memcpy(tree->weights, weights, num_symbols);
  tree->table_log = static_cast<int>(table_log);
  tree->valid = true;
  fill_lengths(tree);
  fill_steps(tree);
  return SeekResult::kIndexed;
}

// The 64 bits before bit `top` of `stream`, the first of them highest; at least 57 are right. Reads up to 8 bytes in
// front of the stream, which are the payload's too.
inline uint64_t load_window(const uint8_t* stream, int64_t top) {
  const int64_t last = (top - 1) >> 3;
  return load_le<uint64_t>(stream + last - 7) << (7 - ((top - 1) & 7));
}

// Walks a stream: where its next bit is, and how many symbols are left of the segment.
struct Walker {
  const uint8_t* stream;
  int64_t top;
  int64_t left;
};

constexpr int kStepsPerLoad = 5;  // of at most 11 bits

template <int kSteps>
inline void walk_steps(const Tree& tree, Walker* walker) {
  const Step* steps = tree.steps + (size_t{1} << tree.table_log);
  uint64_t window = load_window(walker->stream, walker->top);
  uint32_t sum = 0;
  for (int i = 0; i < kSteps; ++i) {
    const uint32_t step = steps[window >> (64 - tree.table_log)];
    window <<= step & 63;  // at most 11 bits; counts begin two bits higher
    sum += step;
  }
  walker->top -= sum & 255;
  walker->left -= sum >> 8;
}

// The last symbols of a segment, for which whole loads would go too far.
bool walk_to_end(const Tree& tree, Walker* walker) {
  while (walker->left >= tree.max_count && walker->top >= 0) walk_steps<1>(tree, walker);
  while (walker->left > 0 && walker->top >= 0) {
    const uint64_t window = load_window(walker->stream, walker->top);
    walker->top -= tree.lengths[window >> (64 - tree.table_log)];
    --walker->left;
  }
  return walker->top >= 0;
}

// Notes the bits of every segment. The streams are walked side by side: while one waits for its table, others go on.
template <int kStreams>
bool walk_streams(const Tree& tree, const uint8_t* src, SeekBlock* block) {
  const int64_t most_per_load = kStepsPerLoad * tree.max_count;
  Walker walkers[kStreams];
  int64_t remaining[kStreams];
  const int64_t each = kStreams == 1 ? block->size : (block->size + 3) / 4;
  for (int i = 0; i < kStreams; ++i) {
    const int64_t nbytes = block->stream_nbytes[i];
    const uint8_t last = src[nbytes - 1];
    if (last == 0) return false;
    const int highest = 31 - __builtin_clz(last);
    walkers[i] = {src, (nbytes - 1) * 8 + highest, 0};
    remaining[i] = i < kStreams - 1 ? each : block->size - each * (kStreams - 1);
    src += nbytes;
  }
  for (int segment = 0; segment * kSegmentSymbols < each; ++segment) {
    int64_t before[kStreams], shortest = kSegmentSymbols;
    for (int i = 0; i < kStreams; ++i) {
      before[i] = walkers[i].top;
      walkers[i].left = std::clamp<int64_t>(remaining[i], 0, kSegmentSymbols);
      shortest = std::min(shortest, walkers[i].left);
    }
    while (shortest >= most_per_load) {
      shortest = kSegmentSymbols;
      for (int i = 0; i < kStreams; ++i) {
        if (walkers[i].top < 0) return false;
        walk_steps<kStepsPerLoad>(tree, &walkers[i]);
        shortest = std::min(shortest, walkers[i].left);
      }
    }
    for (int i = 0; i < kStreams; ++i) {
      if (!walk_to_end(tree, &walkers[i])) return false;
      block->segment_bits[i][segment] = static_cast<uint16_t>(before[i] - walkers[i].top);
      remaining[i] -= kSegmentSymbols;
    }
  }
  return std::all_of(walkers, walkers + kStreams, [](const Walker& w) { return w.top == 0; });
}

void pack_weights(const Tree& tree, SeekBlock* block) {
  block->table_log = static_cast<uint8_t>(tree.table_log);
  for (int i = 0; i < kNumSymbols / 2; ++i) {
    block->weights[i] = static_cast<uint8_t>(tree.weights[2 * i] | tree.weights[2 * i + 1] << 4);
  }
}

// The literals section of a compressed block (RFC 8878, 3.1.1.3.1), up to its end.
SeekResult read_literals(const uint8_t* payload, Bytes* src, Tree* tree, SeekBlock* block) {
  if (src->nbytes < 2) return SeekResult::kCorrupt;
  enum { kRawLiterals, kRepeatedLiterals, kCompressedLiterals, kTreelessLiterals };
  const int type = src->data[0] & 3, format = src->data[0] >> 2 & 3;
  uint64_t header = 0;
  std::memcpy(&header, src->data, std::min<size_t>(src->nbytes, 5));
  if (type == kRawLiterals || type == kRepeatedLiterals) {
    const size_t header_nbytes = format == 1 ? 2 : format == 3 ? 3 : 1;
    block->size = static_cast<uint32_t>(format == 1   ? header >> 4 & 0xfff
                                        : format == 3 ? header >> 4 & 0xfffff
                                                      : header >> 3 & 31);
    const size_t stored = type == kRawLiterals ? block->size : 1;
    if (block->size > kMaxBlockNbytes || src->nbytes < header_nbytes + stored) {
      return SeekResult::kCorrupt;
    }
    src->skip(header_nbytes);
    block->kind = type == kRawLiterals ? SeekKind::kRaw : SeekKind::kRepeated;
    block->src = static_cast<uint64_t>(src->data - payload);
    src->skip(stored);
    return SeekResult::kIndexed;
  }
  const int size_bits = format < 2 ? 10 : format == 2 ? 14 : 18;
  const size_t header_nbytes = format < 2 ? 3 : format == 2 ? 4 : 5;
  const uint64_t mask = (uint64_t{1} << size_bits) - 1;
  const size_t stored = static_cast<size_t>(header >> (4 + size_bits) & mask);
  block->size = static_cast<uint32_t>(header >> 4 & mask);
  if (src->nbytes < header_nbytes + stored) return SeekResult::kCorrupt;
  src->skip(header_nbytes);
  Bytes streams{src->data, stored};
  src->skip(stored);
  if (type == kCompressedLiterals) {
    const SeekResult result = read_tree(&streams, tree);
    if (result != SeekResult::kIndexed) return result;
  }
  block->num_streams = format == 0 ? 1 : 4;
  const bool sized = block->size >= (format == 0 ? 0 : 6) && block->size <= kMaxBlockNbytes;
  if (!tree->valid || !sized) return SeekResult::kCorrupt;
  if (format != 0) {  // the sizes of the first three streams, two bytes each
    if (streams.nbytes < 6) return SeekResult::kCorrupt;
    for (int i = 0; i < 3; ++i) block->stream_nbytes[i] = load_le<uint16_t>(streams.data + 2 * i);
    streams.skip(6);
  }
  const int last = block->num_streams - 1;
  uint64_t rest = streams.nbytes;
  for (int i = 0; i < last; ++i) {
    if (block->stream_nbytes[i] == 0 || block->stream_nbytes[i] >= rest)
      return SeekResult::kCorrupt;
    rest -= block->stream_nbytes[i];
  }
  if (rest == 0) return SeekResult::kCorrupt;
  block->stream_nbytes[last] = static_cast<uint32_t>(rest);
  block->kind = SeekKind::kHuffman;
  block->src = static_cast<uint64_t>(streams.data - payload);
  pack_weights(*tree, block);
  const bool whole = format == 0 ? walk_streams<1>(*tree, streams.data, block)
                                 : walk_streams<4>(*tree, streams.data, block);
  return whole ? SeekResult::kIndexed : SeekResult::kCorrupt;
}

// One block of a frame; `block` comes with what its tile has in common.
SeekResult read_block(const uint8_t* payload, Bytes* src, size_t block_size_max, Tree* tree,
                      SeekBlock* block, bool* is_last) {
  if (src->nbytes < 3) return SeekResult::kCorrupt;
  enum { kRawBlock, kRepeatedBlock, kCompressedBlock, kReservedBlock };
  const uint32_t header =
      src->data[0] | src->data[1] << 8 | static_cast<uint32_t>(src->data[2]) << 16;
  const int type = header >> 1 & 3;
  const size_t size = header >> 3;
  *is_last = header & 1;
  src->skip(3);
  const size_t stored = type == kRepeatedBlock ? 1 : size;
  if (type == kReservedBlock || size > block_size_max || src->nbytes < stored) {
    return SeekResult::kCorrupt;
  }
  Bytes content{src->data, stored};
  src->skip(stored);
  if (type != kCompressedBlock) {
    block->kind = type == kRawBlock ? SeekKind::kRaw : SeekKind::kRepeated;
    block->src = static_cast<uint64_t>(content.data - payload);
    block->size = static_cast<uint32_t>(size);
    return SeekResult::kIndexed;
  }
  const SeekResult result = read_literals(payload, &content, tree, block);
  if (result != SeekResult::kIndexed) return result;
  if (block->size > block_size_max || content.nbytes == 0) return SeekResult::kCorrupt;
  if (content.data[0] != 0) return SeekResult::kOutsideProfile;  // the number of sequences
  return content.nbytes == 1 ? SeekResult::kIndexed : SeekResult::kCorrupt;
}

SeekResult read_frame(const uint8_t* payload, const Chunk& chunk, uint64_t content,
                      const SeekBlock& common, std::vector<SeekBlock>* blocks) {
  Bytes src{payload + chunk.offset, chunk.frame_nbytes};
  ZSTD_FrameHeader header;
  if (ZSTD_getFrameHeader(&header, src.data, src.nbytes) != 0) return SeekResult::kCorrupt;
  const bool is_plain =
      header.frameType == ZSTD_frame && header.dictID == 0 && header.checksumFlag == 0;
  if (!is_plain) return SeekResult::kOutsideProfile;
  const bool sized = header.frameContentSize != ZSTD_CONTENTSIZE_UNKNOWN;
  if (sized && header.frameContentSize > content) return SeekResult::kCorrupt;
  src.skip(header.headerSize);
  Tree tree;
  uint64_t first = 0;
  for (bool is_last = false; !is_last;) {
    SeekBlock block = common;
    const SeekResult result =
        read_block(payload, &src, header.blockSizeMax, &tree, &block, &is_last);
    if (result != SeekResult::kIndexed) return result;
    if (block.size > content - first) return SeekResult::kCorrupt;
    block.first = static_cast<uint32_t>(first);
    first += block.size;
    if (block.size != 0) blocks->push_back(block);
  }
  if (sized && first != header.frameContentSize) return SeekResult::kCorrupt;
  if (src.nbytes != 0) return SeekResult::kOutsideProfile;  // another frame, with the rest
  return first == content ? SeekResult::kIndexed : SeekResult::kCorrupt;
}

// Positions of exceptions lie below the tile's size. One that occurs twice, which our writer never does, would make the
// result depend on the order of threads.
SeekResult check_exceptions(const uint8_t* src, int64_t count, int64_t weights) {
  std::vector<bool> seen;  // only once they are not ascending
  int64_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = load_le<uint32_t>(src + 4 * i) >> 8;
    if (position >= weights) return SeekResult::kCorrupt;
    if (position <= last && seen.empty()) {
      seen.resize(static_cast<size_t>(weights));
      for (int64_t j = 0; j < i; ++j) seen[load_le<uint32_t>(src + 4 * j) >> 8] = true;
    }
    if (!seen.empty()) {
      if (seen[position]) return SeekResult::kOutsideProfile;
      seen[position] = true;
    }
    last = position;
  }
  return SeekResult::kIndexed;
}

SeekResult index_chunk(const PayloadView& view, int64_t index, std::vector<SeekBlock>* blocks) {
  const Chunk chunk = view.chunk(index);
  const Tile tile = view.tile(index);
  SeekBlock common{};
  common.dst = static_cast<uint64_t>(tile.row * view.layout().cols + tile.col);
  common.tile_cols = static_cast<uint32_t>(tile.cols);
  common.tile_weights = static_cast<uint32_t>(tile.weights());
  common.planes = chunk.offset + chunk.frame_nbytes;
  if (chunk.encoding == Encoding::kRaw) {
    common.kind = SeekKind::kRaw;
    for (int64_t first = 0; first < tile.weights(); first += kMaxBlockNbytes) {
      SeekBlock block = common;
      block.first = static_cast<uint32_t>(first);
      block.src = chunk.offset + static_cast<uint64_t>(first);
      block.size = static_cast<uint32_t>(std::min(kMaxBlockNbytes, tile.weights() - first));
      blocks->push_back(block);
    }
    return SeekResult::kIndexed;
  }
  const int64_t exceptions = chunk.num_exceptions(tile);
  common.num_exceptions = static_cast<uint32_t>(exceptions);
  common.filter = static_cast<uint8_t>(chunk.filter.low_bits + (chunk.filter.pairs ? 1 : 0));
  const uint8_t* list = view.data() + common.planes + chunk.filter.planes_nbytes(tile.weights());
  const SeekResult listed = check_exceptions(list, exceptions, tile.weights());
  if (listed != SeekResult::kIndexed) return listed;
  const int64_t content = filtered_nbytes(chunk.filter, tile.weights());
  return read_frame(view.data(), chunk, static_cast<uint64_t>(content), common, blocks);
}

}  // namespace

Failure build_seek_index(const PayloadView& view, Verify verify, Executor& executor,
                         FunctionRef<SeekBlock*(int64_t num_blocks)> allocate, bool* inside) {
  const PayloadLayout& layout = view.layout();
  if (layout.codec == Codec::kPacked) return {Status::kBadArgument, "codec", -1, 1, 2};
  const int64_t n = layout.num_chunks();
  std::vector<std::vector<SeekBlock>> blocks(static_cast<size_t>(n));
  std::vector<Failure> failures(static_cast<size_t>(n));
  std::atomic<bool> outside{false};
  executor.run(n, [&](int64_t i, int) {
    if (outside.load(std::memory_order_relaxed)) return;
    if (verify == Verify::kYes) failures[i] = view.verify_chunk(i);
    if (!failures[i].ok()) return;
    SeekResult result = SeekResult::kCorrupt;
    try {
      result = index_chunk(view, i, &blocks[i]);
    } catch (const std::bad_alloc&) {  // must not leave a worker
      failures[i] = {Status::kOutOfMemory, "seek index", i, 0, 0};
      return;
    }
    if (result == SeekResult::kOutsideProfile) outside = true;
    if (result == SeekResult::kCorrupt) {
      failures[i] = {Status::kCorrupt, "decoded bytes", i,
                     static_cast<uint64_t>(view.tile(i).weights()), 0};
    }
  });
  for (const Failure& failure : failures) {
    if (!failure.ok()) return failure;
  }
  *inside = !outside;
  if (outside) return {};
  int64_t total = 0;
  for (const std::vector<SeekBlock>& of_chunk : blocks) total += of_chunk.size();
  SeekBlock* dst = allocate(total);
  if (dst == nullptr) return {Status::kOutOfMemory, "seek index", -1, 0, 0};
  for (const std::vector<SeekBlock>& of_chunk : blocks) {
    dst = std::copy(of_chunk.begin(), of_chunk.end(), dst);
  }
  return {};
}

}  // namespace dcext
