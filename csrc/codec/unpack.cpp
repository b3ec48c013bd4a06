// Unpacking of whole tiles, for decode() and for products that want row-major weights: 10 GB/s a core with AVX2.

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/cpu_features.h"
#include "codec/packed.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define DCEXT_TARGET "avx2,fma,bmi2"
#endif
#include "base/target_pragmas.h"

namespace dcext {
namespace {

// A block of 16 rows, `groups` whole groups, to `dst`.
using UnpackBlock = void (*)(const PackedTile& tile, const uint8_t* block, int64_t groups,
                             int8_t* dst, int64_t ld_dst);

void unpack_block_scalar(const PackedTile& tile, const uint8_t* block, int64_t groups, int8_t* dst,
                         int64_t ld_dst) {
  int8_t quads[kBlockRows][4];
  for (int64_t v = 0; v < 8 * groups; ++v) {
    const uint8_t* group = block + v / 8 * tile.width * kPieceNbytes;
    unpack_vector(group, tile.width, tile.table, static_cast<int>(v % 8), quads[0]);
    for (int64_t r = 0; r < kBlockRows; ++r) std::memcpy(dst + r * ld_dst + 4 * v, quads[r], 4);
  }
}

#if defined(__x86_64__)
DCEXT_TARGET_BEGIN

#include "base/unroll_body.h"
#include "codec/lookup_avx2_body.h"

// Eight vectors of eight rows x 4 columns to eight rows of 32 columns.
inline DCEXT_ALWAYS_INLINE void store_transposed(const __m256i* vectors, int8_t* dst, int64_t ld) {
  __m256i pairs[8], quads[8];
  unroll<4>([&](auto i) DCEXT_LAMBDA {
    pairs[2 * i] = _mm256_unpacklo_epi32(vectors[2 * i], vectors[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_epi32(vectors[2 * i], vectors[2 * i + 1]);
  });
  unroll<2>([&](auto i) DCEXT_LAMBDA {  // quads[4i + r]: rows r and r + 4, columns of vectors 4i ..
    quads[4 * i] = _mm256_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
    quads[4 * i + 1] = _mm256_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
    quads[4 * i + 2] = _mm256_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    quads[4 * i + 3] = _mm256_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
  });
  unroll<4>([&](auto r) DCEXT_LAMBDA {
    const __m256i first = _mm256_permute2x128_si256(quads[r], quads[4 + r], 0x20);
    const __m256i second = _mm256_permute2x128_si256(quads[r], quads[4 + r], 0x31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + r * ld), first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + (r + 4) * ld), second);
  });
}

template <int kWidth>
void unpack_block_avx2(const PackedTile& tile, const uint8_t* block, int64_t groups, int8_t* dst,
                       int64_t ld_dst) {
  const LookupAvx2<kWidth> lookup(tile.table, 0);
  for (int64_t g = 0; g < groups; ++g) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t* group = block + g * kWidth * kPieceNbytes + half * 32;
      __m256i vectors[8];
      unroll<8>([&](auto v) DCEXT_LAMBDA { vectors[v] = lookup.template weights<v>(group); });
      store_transposed(vectors, dst + half * 8 * ld_dst + g * kGroupCols, ld_dst);
    }
  }
}

DCEXT_TARGET_END
#endif

UnpackBlock unpacker(int width) {
#if defined(__x86_64__)
  static const bool has_avx2 = isa_supported(Isa::kAvx2);
  constexpr UnpackBlock kByWidth[] = {&unpack_block_avx2<2>, &unpack_block_avx2<3>,
                                      &unpack_block_avx2<4>, &unpack_block_avx2<5>,
                                      &unpack_block_avx2<6>};
  if (has_avx2) return kByWidth[width - kMinWidth];
#endif
  return &unpack_block_scalar;
}

bool apply_packed_exceptions(const PackedTile& tile, int8_t* dst, int64_t ld_dst) {
  if (!counts_add_up(tile)) return false;
  int64_t at = 0;
  for (int64_t row = 0; at < tile.num_exceptions; ++row) {
    const int64_t end = at + tile.row_exceptions(row);
    if (end != at && row >= tile.rows) return false;
    for (; at < end; ++at) {
      const int64_t col = tile.column(at);
      if (col >= tile.cols) return false;
      dst[row * ld_dst + col] = tile.values[at];
    }
  }
  return true;
}

}  // namespace

bool decode_packed(const PackedTile& tile, int8_t* dst, int64_t ld_dst) {
  const UnpackBlock unpack = unpacker(tile.width);
  const int64_t whole_groups = tile.cols / kGroupCols, left = tile.cols % kGroupCols;
  int8_t buffer[kBlockRows * kGroupCols];
  for (int64_t b = 0; b < tile.num_blocks(); ++b) {
    const uint8_t* block = tile.codes + b * tile.block_nbytes();
    const int64_t rows = std::min(kBlockRows, tile.rows - b * kBlockRows);
    int8_t* out = dst + b * kBlockRows * ld_dst;
    const bool whole = rows == kBlockRows;
    if (whole) unpack(tile, block, whole_groups, out, ld_dst);
    for (int64_t g = whole ? whole_groups : 0; g < tile.num_groups(); ++g) {
      unpack(tile, block + g * tile.width * kPieceNbytes, 1, buffer, kGroupCols);
      const int64_t cols = g < whole_groups ? kGroupCols : left;
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(out + r * ld_dst + g * kGroupCols, buffer + r * kGroupCols,
                    static_cast<size_t>(cols));
      }
    }
  }
  return tile.num_exceptions == 0 || apply_packed_exceptions(tile, dst, ld_dst);
}

}  // namespace dcext
