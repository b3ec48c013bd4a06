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

// Rounds `n` rows of one column, which do not depend on each other.
DCEXT_INLINE void round_column(const RoundColumns& call, int64_t col, int64_t row, int64_t n) {
  const float step = call.step[col], inverse = 1.0f / step;
  const int64_t at = col * call.rows + row;
  const float* target = call.target + at;
  const float* weight = call.weight + at;
  float* error = call.error + at;
  int8_t* q = call.q + at;
  DCEXT_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const float value = round_level(target[j] * inverse, call.pull);
    q[j] = static_cast<int8_t>(static_cast<int32_t>(value));
    error[j] = weight[j] - value * step;
  }
}

// Rounds the rows of a block in one column, from the last to the first: a chain, but for what each adds to those before.
DCEXT_INLINE void round_column_backwards(const RoundColumns& call, int64_t col, int64_t row,
                                         int64_t n) {
  const float step = call.step[col], inverse = 1.0f / step;
  const int64_t at = col * call.rows + row;
  const float* feedback = call.row_feedback + row * call.row_block;
  float correction[kMaxRowBlock] = {};
  for (int64_t j = n - 1; j >= 0; --j) {
    const float target = call.target[at + j];
    const float rounded = round_level((target + correction[j]) * inverse, call.pull);
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

template <bool kBackwards>
DCEXT_INLINE void round_rows(const RoundColumns& call, int64_t row, int64_t n) {
  for (int64_t col = call.cols - 1; col >= 0; --col) {
    if (kBackwards) {
      round_column_backwards(call, col, row, n);
    } else {
      round_column(call, col, row, n);
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
DCEXT_INLINE void round_lanes(const RoundColumns& call, int64_t row) {
  const int64_t n = std::min(kLanes, call.rows - row);
  if (n == kLanes) {
    round_rows<false>(call, row, kLanes);
  } else {
    round_rows<false>(call, row, n);
  }
}

DCEXT_INLINE void round_block(const RoundColumns& call, int64_t row) {
  round_rows<true>(call, row, std::min(call.row_block, call.rows - row));
}

void round_lanes_baseline(const RoundColumns& call, int64_t row) { round_lanes(call, row); }
void round_block_baseline(const RoundColumns& call, int64_t row) { round_block(call, row); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) void round_lanes_avx2(const RoundColumns& call, int64_t row) {
  round_lanes(call, row);
}
__attribute__((target("avx2"))) void round_block_avx2(const RoundColumns& call, int64_t row) {
  round_block(call, row);
}
#endif

}  // namespace

void round_columns(const RoundColumns& call, Executor& executor) {
  const bool backwards = call.row_feedback != nullptr;
  auto* round = backwards ? &round_block_baseline : &round_lanes_baseline;
#if defined(__x86_64__)
  if (call.isa != Isa::kScalar) round = backwards ? &round_block_avx2 : &round_lanes_avx2;
#endif
  const int64_t size = backwards ? call.row_block : kLanes;
  executor.run((call.rows + size - 1) / size,
               [&](int64_t index, int) { round(call, index * size); });
}

}  // namespace dcext
