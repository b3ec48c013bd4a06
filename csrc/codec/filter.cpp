#include "codec/filter.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "base/cpu_features.h"
#include "base/vectorize.h"

namespace dcext {
namespace {

constexpr int kBias = 8;  // highs of pairs are stored as high + 8
constexpr int64_t kHalf = kFilterGroup / 2;

inline int high_of(const Filter& filter, int8_t weight) { return weight >> filter.low_bits; }
inline bool fits_nibble(int high) { return high >= -8 && high <= 7; }

inline FilterException exception_of(int64_t position, int8_t weight) {
  return static_cast<uint32_t>(position) << 8 | static_cast<uint8_t>(weight);
}

// Whether a byte that occurs `count` times among `total` is worth a code. Codes have at most 11 bits, so a rarer byte
// takes 2^-11 of the code space from all others: 131072 / 2^11 / ln 2 = 92 bits for a block of zstd, more than what
// four exceptions cost.
inline bool is_rare(int64_t count, int64_t total) { return count * 32768 <= total; }

struct RareBytes {
  RareBytes(const uint8_t* highs, int64_t n) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[highs[i]];
    for (int byte = 0; byte < 256; ++byte)
      rare[byte] = counts[byte] != 0 && is_rare(counts[byte], n);
  }
  bool rare[256];
};

// Turns rare highs into zeros, their weights into exceptions.
void except_rare_singles(const int8_t* src, int64_t n, uint8_t* highs,
                         std::vector<FilterException>* exceptions) {
  const RareBytes bytes(highs, n);
  for (int64_t i = 0; i < n; ++i) {
    if (!bytes.rare[highs[i]]) continue;
    highs[i] = 0;
    exceptions->push_back(exception_of(i, src[i]));
  }
}

// The same for pairs: the high farther from zero gives way, and the other one too where that was not enough.
void except_rare_pairs(const int8_t* src, int64_t n, uint8_t* highs,
                       std::vector<FilterException>* exceptions) {
  const int64_t num_bytes = ceil_div(n, kFilterGroup) * kHalf;
  const RareBytes bytes(highs, num_bytes);
  for (int64_t i = 0; i < num_bytes; ++i) {
    while (bytes.rare[highs[i]]) {
      const int low = (highs[i] & 15) - kBias, high = (highs[i] >> 4) - kBias;
      if (low == 0 && high == 0) break;
      const bool second = std::abs(high) > std::abs(low);
      const int64_t position = i / kHalf * kFilterGroup + i % kHalf + (second ? kHalf : 0);
      highs[i] =
          static_cast<uint8_t>(second ? (highs[i] & 15) | kBias << 4 : (highs[i] & 240) | kBias);
      if (position < n) exceptions->push_back(exception_of(position, src[position]));
    }
  }
}

// Planes of a group hold `kBits` bits per weight in 128 * kBits / 8 bytes; byte j holds the weights j, j + stride, ..
template <int kBits>
void pack_plane(const uint8_t* lows, uint8_t* plane) {
  constexpr int64_t kStride = kFilterGroup * kBits / 8;
  for (int64_t j = 0; j < kStride; ++j) {
    int byte = 0;
    for (int part = 0; part < 8 / kBits; ++part) {
      byte |= (lows[part * kStride + j] & ((1 << kBits) - 1)) << (part * kBits);
    }
    plane[j] = static_cast<uint8_t>(byte);
  }
}

void pack_group(const Filter& filter, const int8_t* src, uint8_t* highs, uint8_t* planes) {
  uint8_t lows[kFilterGroup];
  for (int64_t j = 0; j < kFilterGroup; ++j) lows[j] = static_cast<uint8_t>(src[j]);
  if (filter.low_bits == 4) pack_plane<4>(lows, planes);
  if (filter.low_bits == 2) pack_plane<2>(lows, planes);
  if (!filter.pairs) return;
  for (int64_t j = 0; j < kHalf; ++j) {
    const int first = high_of(filter, src[j]), second = high_of(filter, src[kHalf + j]);
    const int low = fits_nibble(first) ? first + kBias : kBias;
    const int high = fits_nibble(second) ? second + kBias : kBias;
    highs[j] = static_cast<uint8_t>(low | high << 4);
  }
}

// Part by part of what shares a byte of the plane or a half of the pairs. Fixed trip counts: the inner loop becomes a
// few vector instructions. Single highs may lie in `group` itself: each is read before its place is written.
template <bool kPairs, int kLowBits>
DCEXT_INLINE void undo_group(const uint8_t* highs, const uint8_t* planes, uint8_t* group) {
  constexpr int64_t kPart = kLowBits == 2 ? kFilterGroup / 4 : kHalf;
  constexpr int kLowMask = (1 << kLowBits) - 1;
  for (int64_t part = 0; part < kFilterGroup / kPart; ++part) {
    const int64_t first = part * kPart;
    const uint8_t* src = highs + (kPairs ? first % kHalf : first);
    const int nibble_shift = first < kHalf ? 0 : 4;
    const int low_shift = static_cast<int>(part) * kLowBits;
    DCEXT_INDEPENDENT
    for (int64_t j = 0; j < kPart; ++j) {
      const unsigned high = kPairs ? ((src[j] >> nibble_shift) & 15u) - kBias : src[j];
      const unsigned low = kLowBits == 0 ? 0 : (planes[j] >> low_shift) & kLowMask;
      group[first + j] = static_cast<uint8_t>((high << kLowBits) | low);
    }
  }
}

template <bool kPairs, int kLowBits>
DCEXT_INLINE void undo_body(const uint8_t* highs, const uint8_t* planes, int64_t n, int8_t* dst) {
  constexpr int64_t kHighs = kPairs ? kHalf : kFilterGroup;
  constexpr int64_t kPlanes = kFilterGroup * kLowBits / 8;
  uint8_t* out = reinterpret_cast<uint8_t*>(dst);
  int64_t i = 0;
  for (; i + kFilterGroup <= n; i += kFilterGroup, highs += kHighs, planes += kPlanes) {
    undo_group<kPairs, kLowBits>(highs, planes, out + i);
  }
  if (i == n) return;
  uint8_t last_highs[kFilterGroup] = {}, group[kFilterGroup];
  std::memcpy(last_highs, highs, static_cast<size_t>(kPairs ? kHalf : n - i));
  undo_group<kPairs, kLowBits>(last_highs, planes, group);
  std::memcpy(out + i, group, static_cast<size_t>(n - i));
}

DCEXT_INLINE void undo_any(const Filter& filter, const uint8_t* highs, const uint8_t* planes,
                           int64_t n, int8_t* dst) {
  switch (filter.low_bits + (filter.pairs ? 1 : 0)) {
    case 1: return undo_body<true, 0>(highs, planes, n, dst);
    case 2: return undo_body<false, 2>(highs, planes, n, dst);
    case 3: return undo_body<true, 2>(highs, planes, n, dst);
    case 4: return undo_body<false, 4>(highs, planes, n, dst);
    case 5: return undo_body<true, 4>(highs, planes, n, dst);
    default: return;  // no filter: `highs` are the weights, decoded in place
  }
}

void undo_baseline(const Filter& filter, const uint8_t* highs, const uint8_t* planes, int64_t n,
                   int8_t* dst) {
  undo_any(filter, highs, planes, n, dst);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void undo_avx2(const Filter& filter, const uint8_t* highs,
                                               const uint8_t* planes, int64_t n, int8_t* dst) {
  undo_any(filter, highs, planes, n, dst);
}
#endif

}  // namespace

int64_t filtered_nbytes(const Filter& filter, int64_t n) {
  return filter.pairs ? ceil_div(n, kFilterGroup) * kHalf : n;
}

void apply_filter(const Filter& filter, const int8_t* src, int64_t n, uint8_t* highs,
                  uint8_t* planes, std::vector<FilterException>* exceptions) {
  if (!filter.pairs) {
    for (int64_t i = 0; i < n; ++i) highs[i] = static_cast<uint8_t>(high_of(filter, src[i]));
  }
  for (int64_t i = 0; i < n; i += kFilterGroup) {
    int8_t last[kFilterGroup] = {};
    const int8_t* group = src + i;
    if (n - i < kFilterGroup) {
      std::copy(src + i, src + n, last);
      group = last;
    }
    pack_group(filter, group, highs + i / 2, planes);
    planes += kFilterGroup * filter.low_bits / 8;
  }
  if (!filter.pairs) return except_rare_singles(src, n, highs, exceptions);
  for (int64_t i = 0; i < n; ++i) {
    if (!fits_nibble(high_of(filter, src[i]))) exceptions->push_back(exception_of(i, src[i]));
  }
  except_rare_pairs(src, n, highs, exceptions);
}

double estimate_bits(const Filter& filter, const int64_t (&counts)[256]) {
  constexpr double kExceptionBits = 8 * sizeof(FilterException);
  int64_t highs[256] = {}, total = 0, exceptions = 0;
  for (int byte = 0; byte < 256; ++byte) {
    const int high = high_of(filter, static_cast<int8_t>(byte));
    const bool exception = filter.pairs && !fits_nibble(high);
    highs[exception ? 0 : high & 255] += counts[byte];
    exceptions += exception ? counts[byte] : 0;
    total += counts[byte];
  }
  double bits = 0;
  for (const int64_t count : highs) {
    if (count != 0) bits -= count * std::log2(static_cast<double>(count) / total);
  }
  return bits / total + filter.low_bits + kExceptionBits * exceptions / total;
}

void undo_filter(const Filter& filter, const uint8_t* highs, const uint8_t* planes, int64_t n,
                 int8_t* dst) {
#if defined(__x86_64__)
  static const bool kHasAvx2 = isa_supported(Isa::kAvx2);
  if (kHasAvx2) return undo_avx2(filter, highs, planes, n, dst);
#endif
  undo_baseline(filter, highs, planes, n, dst);
}

bool apply_exceptions(const uint8_t* exceptions, int64_t count, int64_t n, int8_t* dst) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t exception = load_le<uint32_t>(exceptions + 4 * i);
    const int64_t position = exception >> 8;
    if (position >= n) return false;
    dst[position] = static_cast<int8_t>(exception & 255);
  }
  return true;
}

}  // namespace dcext
