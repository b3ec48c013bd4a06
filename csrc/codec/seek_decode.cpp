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

void write_bytes(const TileWriter& writer, uint32_t position, const Quad* src, uint32_t count) {
  for (uint32_t i = 0; i < count; i += kQuadNbytes) {
    const Quad& bytes = src[i / kQuadNbytes];
    const uint32_t end = std::min(i + kQuadNbytes, count);
    if (end - i == kQuadNbytes && writer.write_quad(position + i, bytes)) continue;
    for (uint32_t j = i; j < end; ++j) {
      writer.write_byte(position + j, reinterpret_cast<const uint8_t*>(src)[j]);
    }
  }
}

// One segment; returns whether it took as many bits as the index says.
bool decode_segment(const SeekBlock& block, const HuffmanTable& table, SegmentReader reader,
                    uint32_t position, uint32_t count, uint32_t bits, const TileWriter& writer) {
  Quad symbols[kSegmentSymbols / kQuadNbytes];
  const int32_t end = reader.position() - static_cast<int32_t>(bits);
  reader.read(table.entries, block.table_log, count, symbols);
  write_bytes(writer, position, symbols, count);
  return reader.position() == end;
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
      writer.write_byte(block.first + i, target.payload[offset]);
    }
  }
  for (uint32_t i = 0; i < block.num_exceptions; ++i) {
    if (!writer.write_exception(block, target, i)) failure |= kDecodeBadException;
  }
  return failure;
}

}  // namespace dcext
