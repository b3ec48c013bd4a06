#include "codec/seek_decode.h"

#include <algorithm>

namespace dcext {
namespace {

bool build_table(const SeekBlock& block, HuffmanTable* table) {
  for (int weight = 1; weight <= kMaxTableLog; ++weight) count_symbols(block, weight, table);
  if (!finish_counts(block, table)) return false;
  for (int weight = 1; weight <= kMaxTableLog; ++weight) list_symbols(block, weight, table);
  for (int entry = 0; entry < 1 << block.table_log; ++entry) {
    table->entries[entry] = table_entry(block, *table, entry);
  }
  return true;
}

// One segment; returns whether it took as many bits as the index says.
bool decode_segment(const SeekBlock& block, const HuffmanTable& table, SegmentReader reader,
                    uint32_t position, uint32_t count, uint32_t expected_bits,
                    const TileWriter& writer) {
  uint32_t bits = 0;
  for (uint32_t i = 0; i < count; i += 4) {
    const uint32_t in_word = std::min<uint32_t>(count - i, 4);
    uint32_t symbols = 0;
    for (uint32_t j = 0; j < in_word; ++j) {
      if (j % 2 == 0) reader.refill();
      symbols |= reader.next_one(table.entries, block.table_log, &bits) << (8 * j);
    }
    writer.write(position + i, symbols, static_cast<int>(in_word));
  }
  return bits == expected_bits;
}

int32_t decode_streams(const SeekBlock& block, const DecodeTarget& target,
                       const TileWriter& writer) {
  HuffmanTable table;
  if (!build_table(block, &table)) return kDecodeBadTable;
  uint64_t end = block.src;
  uint32_t position = block.first;
  for (int stream = 0; stream < block.num_streams; ++stream) {
    const uint64_t begin = end;
    end += block.stream_nbytes[stream];
    uint64_t top = stream_top(target, end);
    const uint32_t total = stream_symbols(block, stream);
    for (uint32_t done = 0; done < total; done += kSegmentSymbols) {
      const uint32_t bits = block.segment_bits[stream][done / kSegmentSymbols];
      if (top < begin * 8 + bits) return kDecodeBadStream;
      const uint32_t count = std::min<uint32_t>(total - done, kSegmentSymbols);
      const SegmentReader reader(target.payload, top);
      if (!decode_segment(block, table, reader, position + done, count, bits, writer)) {
        return kDecodeBadStream;
      }
      top -= bits;
    }
    if (top != begin * 8) return kDecodeBadStream;
    position += total;
  }
  return kDecodeOk;
}

}  // namespace

int32_t decode_seek_block(const SeekBlock& block, const DecodeTarget& target) {
  if (!is_inside(block, target)) return kDecodeBadIndex;
  const TileWriter writer(block, target);
  int32_t failure = kDecodeOk;
  if (block.kind == SeekKind::kHuffman) {
    failure = decode_streams(block, target, writer);
  } else {
    for (uint32_t i = 0; i < block.size; ++i) {
      const uint64_t offset = block.src + (block.kind == SeekKind::kRaw ? i : 0);
      writer.write(block.first + i, target.payload[offset], 1);
    }
  }
  for (uint32_t i = 0; i < block.num_exceptions; ++i) {
    if (!writer.write_exception(i)) failure |= kDecodeBadException;
  }
  return failure;
}

}  // namespace dcext
