#include "quantize/round_columns.h"

#include <algorithm>

#include "base/vectorize.h"

namespace dcext {
namespace {

// Rows at a time: a block of 64 columns of them stays in the L1 cache.
constexpr int64_t kLanes = 32;

// 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to the nearest integer, half to even, without SSE4.1.
constexpr float kRounder = 12582912.0f;
constexpr float kMaxLevel = 127.0f;

// The magnitude goes to the nearest level, or to the one below where that one's shorter code is worth the error.
DCEXT_INLINE float round_level(float scaled, const float* pull) {
  const float absolute = scaled < 0 ? -scaled : scaled;
  const float magnitude = absolute < kMaxLevel ? absolute : kMaxLevel;  // NaN too becomes a level
  const float nearest = (magnitude + kRounder) - kRounder;
  const float rise = nearest - magnitude;
  const float level = nearest - (rise > 0.5f - pull[static_cast<int32_t>(nearest)] ? 1.0f : 0.0f);
  return scaled < 0 ? -level : level;
}

// What the row's table says: a value on a threshold, a multiple of 1/2, belongs to the interval above it.
DCEXT_INLINE float look_up(float scaled, const int8_t* table) {
  constexpr float kLast = static_cast<float>(kTableSize / 2 - 1), kFirst = -kLast - 1.0f;
  const float halves = 2.0f * scaled;
  const float below = halves < kLast ? halves : kLast;  // NaN too becomes an index
  const float inside = below > kFirst ? below : kFirst;
  const int32_t truncated = static_cast<int32_t>(inside);
  const int32_t floor = truncated - (static_cast<float>(truncated) > inside ? 1 : 0);
  return static_cast<float>(table[floor + kTableSize / 2]);
}

// How the rows of a block round: all alike, or each with the table of its panel.
struct Rounder {
  const float* pull;
  const int8_t* tables[kMaxRowBlock];
};

DCEXT_INLINE void set_tables(const RoundColumns& call, int64_t row, int64_t n, Rounder* rounder) {
  for (int64_t j = 0; j < n; ++j) {
    rounder->tables[j] = call.nearest + (row + j) / call.panel_rows * kTableSize;
  }
}

template <bool kTables>
DCEXT_INLINE float round_value(float scaled, const Rounder& rounder, int64_t j) {
  return kTables ? look_up(scaled, rounder.tables[j]) : round_level(scaled, rounder.pull);
}

// Rounds `n` rows of one column, which do not depend on each other.
template <bool kTables>
DCEXT_INLINE void round_column(const RoundColumns& call, const Rounder& rounder, int64_t col,
                               int64_t row, int64_t n) {
  const float step = call.step[col], inverse = 1.0f / step;
  const int64_t at = col * call.rows + row;
  const float* target = call.target + at;
  const float* weight = call.weight + at;
  float* error = call.error + at;
  int8_t* q = call.q + at;
  DCEXT_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const float value = round_value<kTables>(target[j] * inverse, rounder, j);
    q[j] = static_cast<int8_t>(static_cast<int32_t>(value));
    error[j] = weight[j] - value * step;
  }
}

// Rounds the rows of a block in one column, from the last to the first: a chain, but for what each adds to those before.
template <bool kTables>
DCEXT_INLINE void round_column_backwards(const RoundColumns& call, const Rounder& rounder,
                                         int64_t col, int64_t row, int64_t n) {
  const float step = call.step[col], inverse = 1.0f / step;
  const int64_t at = col * call.rows + row;
  const float* feedback = call.row_feedback + row * call.row_block;
  float correction[kMaxRowBlock] = {};
  for (int64_t j = n - 1; j >= 0; --j) {
    const float target = call.target[at + j];
    const float rounded = round_value<kTables>((target + correction[j]) * inverse, rounder, j);
    call.q[at + j] = static_cast<int8_t>(static_cast<int32_t>(rounded));
    call.error[at + j] = call.weight[at + j] - rounded * step;
    const float missed = target - rounded * step;
    const float* factor = feedback + j * call.row_block;
    // Whole groups: beyond row j - 1 the factors are zero.
    for (int64_t begin = 0; begin < j; begin += kRowGroup) {
      DCEXT_INDEPENDENT
      for (int64_t i = begin; i < begin + kRowGroup; ++i) correction[i] += missed * factor[i];
    }
  }
}

template <bool kBackwards, bool kTables>
DCEXT_INLINE void round_rows(const RoundColumns& call, int64_t row, int64_t n) {
  Rounder rounder;
  rounder.pull = call.pull;
  if (kTables) set_tables(call, row, n, &rounder);
  for (int64_t col = call.cols - 1; col >= 0; --col) {
    if (kBackwards) {
      round_column_backwards<kTables>(call, rounder, col, row, n);
    } else {
      round_column<kTables>(call, rounder, col, row, n);
    }
    const float* error = call.error + col * call.rows + row;
    const float* feedback = call.feedback + col * call.cols;
    for (int64_t i = 0; i < col; ++i) {
      float* target = call.target + i * call.rows + row;
      const float factor = feedback[i];
      DCEXT_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) target[j] += error[j] * factor;
    }
  }
}

// A constant number of lanes lets the compiler keep whole vectors; the last rows take the loop of any length.
template <bool kTables>
DCEXT_INLINE void round_lanes(const RoundColumns& call, int64_t row) {
  const int64_t n = std::min(kLanes, call.rows - row);
  if (n == kLanes) {
    round_rows<false, kTables>(call, row, kLanes);
  } else {
    round_rows<false, kTables>(call, row, n);
  }
}

template <bool kTables>
DCEXT_INLINE void round_block(const RoundColumns& call, int64_t row) {
  round_rows<true, kTables>(call, row, std::min(call.row_block, call.rows - row));
}

using RoundFn = void(const RoundColumns& call, int64_t row);

template <bool kTables>
void round_lanes_baseline(const RoundColumns& call, int64_t row) {
  round_lanes<kTables>(call, row);
}
template <bool kTables>
void round_block_baseline(const RoundColumns& call, int64_t row) {
  round_block<kTables>(call, row);
}

#if defined(__x86_64__)
template <bool kTables>
__attribute__((target("avx2"))) void round_lanes_avx2(const RoundColumns& call, int64_t row) {
  round_lanes<kTables>(call, row);
}
template <bool kTables>
__attribute__((target("avx2"))) void round_block_avx2(const RoundColumns& call, int64_t row) {
  round_block<kTables>(call, row);
}
#endif

template <bool kTables>
RoundFn* choose(bool backwards, Isa isa) {
#if defined(__x86_64__)
  if (isa != Isa::kScalar) return backwards ? round_block_avx2<kTables> : round_lanes_avx2<kTables>;
#endif
  return backwards ? round_block_baseline<kTables> : round_lanes_baseline<kTables>;
}

}  // namespace

void round_columns(const RoundColumns& call, Executor& executor) {
  const bool backwards = call.row_feedback != nullptr;
  RoundFn* const round = call.nearest != nullptr ? choose<true>(backwards, call.isa)
                                                 : choose<false>(backwards, call.isa);
  const int64_t size = backwards ? call.row_block : kLanes;
  executor.run((call.rows + size - 1) / size,
               [&](int64_t index, int) { round(call, index * size); });
}

}  // namespace dcext
