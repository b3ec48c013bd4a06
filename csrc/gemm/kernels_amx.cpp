// AMX: tdpbssd multiplies a tile of 16 weight rows x 64 columns, loaded as it lies in the row-major panel, with a tile
// of 64 columns x 16 tokens, packed once per layer, into 16 x 16 int32 sums. Two tiles of rows and two of tokens share
// their loads. In the L2 cache that gives 1800 GMAC/s of the 3485 of the tile unit (16 cycles per product): loads from
// L2 are the limit, and copying weights into contiguous tiles gained nothing. Nor did software prefetch of weights in
// memory: it takes the fill buffers that tile loads need. Everything but the product is the AVX-512 kernels' own.

#include "gemm/kernel_table.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <utility>

#define DCEXT_TARGET "avx2,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8"
#include "base/target_pragmas.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593, in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

DCEXT_TARGET_BEGIN

namespace dcext {
namespace {

#include "base/unroll_body.h"

constexpr int64_t kTile = 16;      // rows of weights, and tokens
constexpr int64_t kTileCols = 64;  // columns: one product
constexpr int64_t kTileBytes = kTile * kTileCols;
constexpr int64_t kTokenTiles = 8;  // 512 KiB of 4096 columns: they stay in the L2 cache
static_assert(kPackTokens == kTile, "a call of pack() fills whole tiles");

constexpr int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

// GCC's tile intrinsics do not say which memory they read: stores before them must not be delayed or dropped.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// Transposes 16 x 16 elements of 32 bits: pairs of rows, then of pairs, within 128 bits; then the 128-bit parts.
inline DCEXT_ALWAYS_INLINE void transpose(__m512i* rows) {
  __m512i pairs[16], quads[16];
  unroll<8>([&](auto i) DCEXT_LAMBDA {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  unroll<4>(
      [&](auto i)
          DCEXT_LAMBDA {  // quads[4i + c]: rows 4i .. 4i + 3 of columns c, c + 4, c + 8, c + 12
            quads[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
            quads[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
            quads[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
            quads[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
          });
  unroll<4>([&](auto c) DCEXT_LAMBDA {
    const __m512i a = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xdd);
    const __m512i e = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    rows[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
    rows[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
  });
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0, 1 (sums) and 4 (weights) have `rows0` rows, tiles 2, 3 and 5 `rows1`; 6 and 7 hold activations.
void configure_tiles(int64_t rows0, int64_t rows1) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    const bool second = i == 2 || i == 3 || i == 5;
    config.row_bytes[i] = kTileCols;
    config.rows[i] = static_cast<uint8_t>(i >= 6 ? kTile : second ? rows1 : rows0);
  }
  finish_stores();
  _tile_loadconfig(&config);
}

// Up to 32 rows of the panel. Columns behind the last whole tile are copied to `edge`, padded with zeros.
struct RowPair {
  const int8_t* data;
  int64_t ld, rows[2], whole_tiles;
  bool has_edge;
  int8_t* edge;  // 2 tiles
};

RowPair load_row_pair(const WeightPanel& panel, int64_t n, int8_t* edge) {
  const int64_t rows = smaller(2 * kTile, panel.rows - n), whole_tiles = panel.cols / kTileCols;
  const int64_t left = panel.cols - whole_tiles * kTileCols;
  const RowPair pair{panel.data + n * panel.ld,
                     panel.ld,
                     {smaller(kTile, rows), rows - smaller(kTile, rows)},
                     whole_tiles,
                     left != 0,
                     edge};
  for (int64_t r = 0; left != 0 && r < rows; ++r) {
    const int8_t* src = pair.data + r * panel.ld + whole_tiles * kTileCols;
    _mm512_store_si512(edge + r * kTileCols, _mm512_maskz_loadu_epi8((~0ull) >> (64 - left), src));
  }
  return pair;
}

template <int kRowTiles, int kTokens>
inline DCEXT_ALWAYS_INLINE void tile_step(const int8_t* w, int64_t ld, const uint8_t* x0,
                                          const uint8_t* x1) {
  _tile_loadd(4, w, ld);
  _tile_loadd(6, x0, kTileCols);
  _tile_dpbssd(0, 4, 6);
  if constexpr (kTokens == 2) {
    _tile_loadd(7, x1, kTileCols);
    _tile_dpbssd(1, 4, 7);
  }
  if constexpr (kRowTiles == 2) {
    _tile_loadd(5, w + kTile * ld, ld);
    _tile_dpbssd(2, 5, 6);
    if constexpr (kTokens == 2) _tile_dpbssd(3, 5, 7);
  }
}

// A 16 x 16 block of sums, [row][token], to acc[token][row].
inline void store_transposed(const int32_t* sums, int64_t rows, int64_t tokens, int64_t ld,
                             int32_t* acc) {
  __m512i lines[16];
  unroll<16>([&](auto i) DCEXT_LAMBDA { lines[i] = _mm512_load_si512(sums + i * kTile); });
  transpose(lines);
  const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
  unroll<16>([&](auto m) DCEXT_LAMBDA {
    if (m < tokens) _mm512_mask_storeu_epi32(acc + m * ld, mask, lines[m]);
  });
}

// The rows of `pair` times kTokens tiles of tokens. `acc` is that of the first token and row.
template <int kRowTiles, int kTokens>
inline void tile_block(const RowPair& pair, const uint8_t* x, int64_t column_tiles, int64_t tokens,
                       int64_t acc_ld, int32_t* sums, int32_t* acc) {
  const uint8_t* x1 = x + column_tiles * kTileBytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < pair.whole_tiles; ++c) {
    tile_step<kRowTiles, kTokens>(pair.data + c * kTileCols, pair.ld, x + c * kTileBytes,
                                  x1 + c * kTileBytes);
  }
  if (pair.has_edge) {
    const int64_t at = pair.whole_tiles * kTileBytes;
    finish_stores();
    tile_step<kRowTiles, kTokens>(pair.edge, kTileCols, x + at, x1 + at);
  }
  constexpr int64_t kSums = kTile * kTile;
  _tile_stored(0, sums, kTile * 4);
  if constexpr (kTokens == 2) _tile_stored(1, sums + kSums, kTile * 4);
  if constexpr (kRowTiles == 2) _tile_stored(2, sums + 2 * kSums, kTile * 4);
  if constexpr (kRowTiles == 2 && kTokens == 2) _tile_stored(3, sums + 3 * kSums, kTile * 4);
  for (int r = 0; r < kRowTiles; ++r) {
    for (int t = 0; t < kTokens; ++t) {
      store_transposed(sums + (2 * r + t) * kSums, pair.rows[r], smaller(kTile, tokens - t * kTile),
                       acc_ld, acc + t * kTile * acc_ld + r * kTile);
    }
  }
}

// A panel's rows times the tiles [begin, end) of tokens.
struct TokenRange {
  const uint8_t* packed;
  int64_t tokens, column_tiles, begin, end;
};

template <int kRowTiles>
void tile_rows(const RowPair& pair, const TokenRange& range, int64_t acc_ld, int32_t* sums,
               int32_t* acc) {
  for (int64_t b = range.begin; b < range.end; b += 2) {
    const uint8_t* x = range.packed + b * range.column_tiles * kTileBytes;
    const int64_t tokens = range.tokens - b * kTile;
    if (b + 2 <= range.end) {
      tile_block<kRowTiles, 2>(pair, x, range.column_tiles, tokens, acc_ld, sums,
                               acc + b * kTile * acc_ld);
    } else {
      tile_block<kRowTiles, 1>(pair, x, range.column_tiles, tokens, acc_ld, sums,
                               acc + b * kTile * acc_ld);
    }
  }
}

}  // namespace

// Tile (token block, column block) is contiguous: row j holds columns 4j .. 4j+3 of each of the 16 tokens.
int64_t amx_packed_nbytes(int64_t tokens, int64_t cols) {
  return tiles(tokens, kTile) * tiles(cols, kTileCols) * kTileBytes;
}

void amx_pack(const int8_t* q, int64_t ld, int64_t tokens, int64_t cols, int64_t begin, int64_t end,
              uint8_t* packed) {
  const int64_t column_tiles = tiles(cols, kTileCols);
  for (int64_t block = begin / kTile; block < tiles(end, kTile); ++block) {
    uint8_t* out = packed + block * column_tiles * kTileBytes;
    const int64_t count = smaller(kTile, tokens - block * kTile);
    for (int64_t c = 0; c < column_tiles; ++c) {
      const int64_t left = smaller(kTileCols, cols - c * kTileCols);
      const __mmask64 mask = (~0ull) >> (64 - left);
      const int8_t* src = q + block * kTile * ld + c * kTileCols;
      __m512i rows[16];
      unroll<16>([&](auto m) DCEXT_LAMBDA {
        rows[m] = _mm512_maskz_loadu_epi8(m < count ? mask : 0, m < count ? src + m * ld : src);
      });
      transpose(rows);
      unroll<16>([&](auto j) DCEXT_LAMBDA {
        _mm512_store_si512(out + c * kTileBytes + j * kTileCols, rows[j]);
      });
    }
  }
}

void amx_multiply(const WeightPanel& panel, const uint8_t* packed, int64_t tokens, int32_t* acc) {
  alignas(64) int8_t edge[2 * kTileBytes];
  alignas(64) int32_t sums[4 * kTile * kTile] = {};
  const int64_t token_tiles = tiles(tokens, kTile);
  TokenRange range{packed, tokens, tiles(panel.cols, kTileCols), 0, 0};
  for (; range.begin < token_tiles; range.begin = range.end) {
    range.end = smaller(token_tiles, range.begin + kTokenTiles);
    int64_t rows0 = 0, rows1 = 0;
    for (int64_t n = 0; n < panel.rows; n += 2 * kTile) {
      const RowPair pair = load_row_pair(panel, n, edge);
      if (pair.rows[0] != rows0 || pair.rows[1] != rows1) {
        rows0 = pair.rows[0];
        rows1 = pair.rows[1];
        configure_tiles(rows0, rows1 == 0 ? kTile : rows1);
      }
      if (rows1 != 0) {
        tile_rows<2>(pair, range, panel.rows, sums, acc + n);
      } else {
        tile_rows<1>(pair, range, panel.rows, sums, acc + n);
      }
    }
  }
  _tile_release();
}

}  // namespace dcext

DCEXT_TARGET_END

#endif  // __x86_64__
