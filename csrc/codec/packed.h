#pragma once

#include <vector>

#include "format/payload.h"

namespace dcext {

// Packed chunks (PAYLOAD.md, "packed"): a table of weights, codes of fixed width, exceptions.

/** A packed chunk where it rests. */
struct PackedTile {
  const int8_t* table;     ///< kTableNbytes
  const uint8_t* codes;    ///< 64-byte aligned
  const uint8_t* counts;   ///< exceptions of each row, 16 bits each; null where the tile has none
  const uint8_t* columns;  ///< of the exceptions, 16 bits each
  const int8_t* values;    ///< of the exceptions
  int64_t rows, cols, num_exceptions;
  int width;

  int64_t num_blocks() const { return ceil_div(rows, kBlockRows); }
  int64_t num_groups() const { return ceil_div(cols, kGroupCols); }
  int64_t block_nbytes() const { return num_groups() * width * kPieceNbytes; }
  int64_t row_exceptions(int64_t row) const { return load_le<uint16_t>(counts + 2 * row); }
  int64_t column(int64_t exception) const { return load_le<uint16_t>(columns + 2 * exception); }
};

/** Chunk `index` of a parsed payload, which must be packed. Reads nothing but the chunk table. */
PackedTile packed_tile(const PayloadView& view, int64_t index);

/** Whether the rows' numbers of exceptions add up to all of them: with that, walking the exceptions stays inside the
 *  chunk. Cheap; layers ask each time. */
bool counts_add_up(const PackedTile& tile);

/** Whether a chunk is as a writer may have written it: zeros behind the table, numbers of exceptions, columns in range
 *  and ascending, code 0 where an exception stands. */
bool check_packed(const PackedTile& tile);

/** A tile or matrix that shrinks to more than this share is stored raw. */
constexpr double kRawThreshold = 0.98;

/** The width and table that serve a tile best.
 *
 *  The table holds the most frequent weights. The width is that of the fewest bytes, exceptions being charged
 *  kExceptionCharge each: a core adds one to a product in the time in which it reads about 25 bytes of codes, and size
 *  counts as well as time.
 *  @param counts   how often each weight occurs, indexed by its byte.
 *  @param table   receives kTableNbytes.
 *  @return the width, or 0 where raw takes less than all widths. */
int choose_width(const Tile& tile, const int64_t (&counts)[256], int8_t* table);
constexpr int64_t kExceptionCharge = 8;

/** Packs a tile.
 *  @param src, ld   row-major weights and the distance of their rows.
 *  @param table   kTableNbytes, as choose_width gives them.
 *  @param out   receives the chunk. */
void encode_packed(const int8_t* src, int64_t ld, const Tile& tile, int width, const int8_t* table,
                   std::vector<uint8_t>* out);

/** Unpacks a tile, exceptions included.
 *  @param dst, ld_dst   row-major destination and the distance of its rows.
 *  @return false where counts do not add up or a column is out of range; `dst` is then partly written. */
bool decode_packed(const PackedTile& tile, int8_t* dst, int64_t ld_dst);

/** The weights of vector `v` of a group, exceptions aside: columns 4v .. 4v + 3 of 16 rows, out[16][4].
 *  @param group   `width` pieces. */
void unpack_vector(const uint8_t* group, int width, const int8_t* table, int v, int8_t* out);

}  // namespace dcext
