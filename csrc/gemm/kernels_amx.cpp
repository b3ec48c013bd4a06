// AMX: tdpbssd multiplies a tile of 16 weight rows x 64 columns, loaded as it lies in the row-major panel, with a tile
// of 64 columns x 16 tokens, packed once per layer, into 16 x 16 int32 sums. Two tiles of rows and two of tokens share
// their loads, so that the tile unit (16 cycles per product) and not the loads bound it. Everything but the product is
// the AVX-512 kernels' own.

#include "gemm/kernel_table.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "gemm/target_pragmas.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593, in its own intrinsics
#endif

DCEXT_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8")

namespace dcext {
namespace {

constexpr int64_t kTile = 16;      // rows of weights, and tokens
constexpr int64_t kTileCols = 64;  // columns: one product
constexpr int64_t kTileBytes = kTile * kTileCols;

constexpr int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Tile (token block, column block) is contiguous: row j holds columns 4j .. 4j+3 of each of the 16 tokens.
int64_t packed_nbytes(int64_t tokens, int64_t cols) {
  return tiles(tokens, kTile) * tiles(cols, kTileCols) * kTileBytes;
}

void pack(const int8_t* q, int64_t tokens, int64_t cols, int64_t begin, int64_t end,
          uint8_t* packed) {
  const int64_t column_tiles = tiles(cols, kTileCols);
  for (int64_t block = begin / kTile; block < tiles(end, kTile); ++block) {
    uint8_t* out = packed + block * column_tiles * kTileBytes;
    std::memset(out, 0, static_cast<size_t>(column_tiles * kTileBytes));
    const int64_t last = (block + 1) * kTile < tokens ? kTile : tokens - block * kTile;
    for (int64_t m = 0; m < last; ++m) {
      const int8_t* row = q + (block * kTile + m) * cols;
      for (int64_t k = 0; k < cols; k += 4) {
        std::memcpy(out + k * kTile + m * 4, row + k,
                    static_cast<size_t>(cols - k < 4 ? cols - k : 4));
      }
    }
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure_tiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kTileCols;
    config.rows[i] = kTile;
  }
  _tile_loadconfig(&config);
}

// 16 rows x 64 columns of the panel at (n, k): in place, or gathered into `edge` with zeros where the panel ends.
struct WeightTile {
  const int8_t* data;
  int64_t ld;
};

inline WeightTile weight_tile(const WeightPanel& panel, int64_t n, int64_t k, int8_t* edge) {
  const int8_t* src = panel.data + n * panel.ld + k;
  if (n + kTile <= panel.rows && k + kTileCols <= panel.cols) return {src, panel.ld};
  const int64_t rows = panel.rows - n < kTile ? panel.rows - n : kTile;
  const int64_t cols = panel.cols - k < kTileCols ? panel.cols - k : kTileCols;
  std::memset(edge, 0, static_cast<size_t>(kTileBytes));
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(edge + r * kTileCols, src + r * panel.ld, static_cast<size_t>(cols));
  }
  return {edge, kTileCols};
}

// A 16 x 16 block of sums, [row][token], to acc[token][row].
inline void store_transposed(const int32_t* sums, int64_t rows, int64_t tokens, int64_t ld,
                             int32_t* acc) {
  const __m512i index =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                         _mm512_set1_epi32(kTile));
  const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
  for (int64_t m = 0; m < tokens; ++m) {
    _mm512_mask_storeu_epi32(acc + m * ld, mask, _mm512_i32gather_epi32(index, sums + m, 4));
  }
}

// Rows n .. n + 16 kRowTiles times token blocks b .. b + kTokenTiles.
template <int kRowTiles, int kTokenTiles>
inline __attribute__((always_inline)) void tile_block(const WeightPanel& panel,
                                                      const uint8_t* packed, int64_t tokens,
                                                      int64_t n, int64_t b, int32_t* acc) {
  alignas(64) int8_t edges[2][kTileBytes];
  alignas(64) int32_t sums[4][kTile * kTile];
  const int64_t column_tiles = tiles(panel.cols, kTileCols);
  const uint8_t* x0 = packed + b * column_tiles * kTileBytes;
  const uint8_t* x1 = x0 + column_tiles * kTileBytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < column_tiles; ++c) {
    const WeightTile w0 = weight_tile(panel, n, c * kTileCols, edges[0]);
    _tile_loadd(4, w0.data, w0.ld);
    _tile_loadd(6, x0 + c * kTileBytes, kTileCols);
    _tile_dpbssd(0, 4, 6);
    if (kTokenTiles == 2) {
      _tile_loadd(7, x1 + c * kTileBytes, kTileCols);
      _tile_dpbssd(1, 4, 7);
    }
    if (kRowTiles == 2) {
      const WeightTile w1 = weight_tile(panel, n + kTile, c * kTileCols, edges[1]);
      _tile_loadd(5, w1.data, w1.ld);
      _tile_dpbssd(2, 5, 6);
      if (kTokenTiles == 2) _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], kTile * 4);
  if (kTokenTiles == 2) _tile_stored(1, sums[1], kTile * 4);
  if (kRowTiles == 2) _tile_stored(2, sums[2], kTile * 4);
  if (kRowTiles == 2 && kTokenTiles == 2) _tile_stored(3, sums[3], kTile * 4);
  for (int r = 0; r < kRowTiles; ++r) {
    const int64_t row = n + r * kTile, rows = panel.rows - row < kTile ? panel.rows - row : kTile;
    for (int t = 0; t < kTokenTiles; ++t) {
      const int64_t token = (b + t) * kTile;
      const int64_t count = tokens - token < kTile ? tokens - token : kTile;
      store_transposed(sums[2 * r + t], rows, count, panel.rows, acc + token * panel.rows + row);
    }
  }
}

template <int kRowTiles>
inline __attribute__((always_inline)) void tile_rows(const WeightPanel& panel,
                                                     const uint8_t* packed, int64_t tokens,
                                                     int64_t n, int64_t begin, int64_t end,
                                                     int32_t* acc) {
  int64_t b = begin;
  for (; b + 2 <= end; b += 2) tile_block<kRowTiles, 2>(panel, packed, tokens, n, b, acc);
  if (b < end) tile_block<kRowTiles, 1>(panel, packed, tokens, n, b, acc);
}

void multiply(const WeightPanel& panel, const uint8_t* packed, int64_t tokens, int32_t* acc) {
  constexpr int64_t kTokenBlocks =
      8;  // 128 tokens of 4096 columns are 512 KiB: they stay in the L2 cache
  const int64_t blocks = tiles(tokens, kTile);
  configure_tiles();
  for (int64_t begin = 0; begin < blocks; begin += kTokenBlocks) {
    const int64_t end = blocks - begin < kTokenBlocks ? blocks : begin + kTokenBlocks;
    int64_t n = 0;
    for (; n + kTile < panel.rows; n += 2 * kTile)
      tile_rows<2>(panel, packed, tokens, n, begin, end, acc);
    if (n < panel.rows) tile_rows<1>(panel, packed, tokens, n, begin, end, acc);
  }
  _tile_release();
}

}  // namespace

extern const GemmKernels kAmxKernels = {Isa::kAmx,
                                        kAvx512Kernels.quantize,
                                        packed_nbytes,
                                        pack,
                                        multiply,
                                        kAvx512Kernels.dequantize,
                                        kAvx512Kernels.multiply_weight_only,
                                        kAvx512Kernels.widen,
                                        kAvx512Kernels.dequantize_row};

}  // namespace dcext

DCEXT_TARGET_END

#endif  // __x86_64__
