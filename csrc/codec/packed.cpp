#include "codec/packed.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace dcext {
namespace {

constexpr int kQuad = 4;  // columns of one vector of a group

// Where a code's bits lie: `bits` of them from `shift` on in byte 4r + c of piece `piece`; they are the code's from
// `to` on.
struct BitField {
  int piece, shift, bits, to;
};

// The fields of the code of vector v; returns how many there are.
int fields_of(int width, int v, BitField (&fields)[2]) {
  int count = 0, piece = 0, to = 0;
  if (width >= 4) {
    fields[count++] = {piece + v % 4, v / 4 * 4, 4, to};
    piece += 4, to += 4;
  }
  if (width % 4 >= 2) {
    fields[count++] = {piece + v % 2, v / 2 * 2, 2, to};
    piece += 2, to += 2;
  }
  if (width % 2 == 1) fields[count++] = {piece, v, 1, to};
  return count;
}

// The bits of a field in byte `at` of its piece, where they belong in the code.
int bits_at(const uint8_t* group, const BitField& field, int64_t at) {
  const int byte = group[field.piece * kPieceNbytes + at];
  return (byte >> field.shift & ((1 << field.bits) - 1)) << field.to;
}

// Code of row `row` of a block at column `col` of a group.
int code_at(const uint8_t* group, int width, int64_t row, int64_t col) {
  BitField fields[2];
  const int count = fields_of(width, static_cast<int>(col / kQuad), fields);
  int code = 0;
  for (int i = 0; i < count; ++i) code |= bits_at(group, fields[i], row * kQuad + col % kQuad);
  return code;
}

// Sets the code of a weight; its bits must be zero.
void set_code(uint8_t* group, int width, int64_t row, int64_t col, int code) {
  BitField fields[2];
  const int count = fields_of(width, static_cast<int>(col / kQuad), fields);
  for (int i = 0; i < count; ++i) {
    const BitField& field = fields[i];
    const int bits = code >> field.to & ((1 << field.bits) - 1);
    group[field.piece * kPieceNbytes + row * kQuad + col % kQuad] |=
        static_cast<uint8_t>(bits << field.shift);
  }
}

const uint8_t* group_of(const PackedTile& tile, int64_t row, int64_t col) {
  return tile.codes + row / kBlockRows * tile.block_nbytes() +
         col / kGroupCols * tile.width * kPieceNbytes;
}

// Weights by how often they occur, most frequent first; among equals the lower first.
std::array<int, 256> by_frequency(const int64_t (&counts)[256]) {
  std::array<int, 256> weights;
  std::iota(weights.begin(), weights.end(), -128);
  std::stable_sort(weights.begin(), weights.end(), [&](int a, int b) {
    return counts[static_cast<uint8_t>(a)] > counts[static_cast<uint8_t>(b)];
  });
  return weights;
}

}  // namespace

PackedTile packed_tile(const PayloadView& view, int64_t index) {
  const Chunk chunk = view.chunk(index);
  const Tile tile = view.tile(index);
  const uint8_t* data = view.data() + chunk.offset;
  PackedTile packed{};
  packed.table = reinterpret_cast<const int8_t*>(data);
  packed.codes = data + kTableNbytes;
  packed.rows = tile.rows;
  packed.cols = tile.cols;
  packed.width = chunk.width;
  packed.num_exceptions = chunk.num_exceptions(tile);
  if (packed.num_exceptions != 0) {
    packed.counts = packed.codes + chunk.codes_nbytes(tile);
    packed.columns = packed.counts + exception_counts_nbytes(tile);
    packed.values = reinterpret_cast<const int8_t*>(packed.columns + 2 * packed.num_exceptions);
  }
  return packed;
}

bool counts_add_up(const PackedTile& tile) {
  if (tile.num_exceptions == 0) return true;
  int64_t sum = 0;
  for (int64_t row = 0; row < tile.num_blocks() * kBlockRows; ++row)
    sum += tile.row_exceptions(row);
  return sum == tile.num_exceptions;
}

bool check_packed(const PackedTile& tile) {
  const int8_t* unused = tile.table + (1 << tile.width);
  if (std::any_of(unused, tile.table + kTableNbytes, [](int8_t w) { return w != 0; })) return false;
  if (!counts_add_up(tile)) return false;
  int64_t at = 0;
  for (int64_t row = 0; at < tile.num_exceptions; ++row) {
    const int64_t count = tile.row_exceptions(row);
    if (count != 0 && row >= tile.rows) return false;
    int64_t last = -1;
    for (int64_t end = at + count; at < end; ++at) {
      const int64_t col = tile.column(at);
      if (col <= last || col >= tile.cols) return false;
      const uint8_t* group = group_of(tile, row, col);
      if (code_at(group, tile.width, row % kBlockRows, col % kGroupCols) != 0) return false;
      last = col;
    }
  }
  return true;
}

int choose_width(const Tile& tile, const int64_t (&counts)[256], int8_t* table) {
  const std::array<int, 256> weights = by_frequency(counts);
  int best = 0;
  double least = kRawThreshold * static_cast<double>(tile.weights());
  int64_t left = tile.weights();
  int held = 0;
  for (int width = kMinWidth; width <= kMaxWidth; ++width) {
    for (; held < 1 << width; ++held) left -= counts[static_cast<uint8_t>(weights[held])];
    Chunk chunk;
    chunk.width = width;
    const int64_t charge = left == 0 ? 0 : exception_counts_nbytes(tile) + kExceptionCharge * left;
    const double nbytes = static_cast<double>(kTableNbytes + chunk.codes_nbytes(tile) + charge);
    if (nbytes < least) {
      least = nbytes;
      best = width;
    }
  }
  std::fill_n(table, kTableNbytes, int8_t{0});
  const int size = best == 0 ? 0 : 1 << best;
  int used = 0;
  for (; used < size && counts[static_cast<uint8_t>(weights[used])] != 0; ++used) {
    table[used] = static_cast<int8_t>(weights[used]);
  }
  std::sort(table, table + used);
  return best;
}

void encode_packed(const int8_t* src, int64_t ld, const Tile& tile, int width, const int8_t* table,
                   std::vector<uint8_t>* out) {
  int code_of[256];
  std::fill_n(code_of, 256, -1);
  for (int code = (1 << width) - 1; code >= 0; --code) {
    code_of[static_cast<uint8_t>(table[code])] = code;
  }
  Chunk chunk;
  chunk.width = width;
  out->assign(static_cast<size_t>(kTableNbytes + chunk.codes_nbytes(tile)), 0);
  std::memcpy(out->data(), table, size_t{kTableNbytes});
  uint8_t* codes = out->data() + kTableNbytes;
  const int64_t group_nbytes = width * kPieceNbytes;
  std::vector<uint8_t> counts(static_cast<size_t>(exception_counts_nbytes(tile)), 0);
  std::vector<uint8_t> columns, values;
  for (int64_t row = 0; row < tile.rows; ++row) {
    uint8_t* block = codes + row / kBlockRows * tile.num_groups() * group_nbytes;
    uint16_t count = 0;
    for (int64_t col = 0; col < tile.cols; ++col) {
      const int8_t weight = src[row * ld + col];
      const int code = code_of[static_cast<uint8_t>(weight)];
      if (code >= 0) {
        set_code(block + col / kGroupCols * group_nbytes, width, row % kBlockRows, col % kGroupCols,
                 code);
        continue;
      }
      columns.resize(columns.size() + 2);
      store_le<uint16_t>(columns.data() + columns.size() - 2, static_cast<uint16_t>(col));
      values.push_back(static_cast<uint8_t>(weight));
      ++count;
    }
    store_le<uint16_t>(counts.data() + 2 * row, count);
  }
  if (values.empty()) return;
  for (const std::vector<uint8_t>& part : {counts, columns, values}) {
    out->insert(out->end(), part.begin(), part.end());
  }
}

void unpack_vector(const uint8_t* group, int width, const int8_t* table, int v, int8_t* out) {
  BitField fields[2];
  const int count = fields_of(width, v, fields);
  for (int i = 0; i < kPieceNbytes; ++i) {
    int code = 0;
    for (int f = 0; f < count; ++f) code |= bits_at(group, fields[f], i);
    out[i] = table[code];
  }
}

}  // namespace dcext
