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

// Rounds one column of `n` rows. The magnitude goes to the nearest level, or to the one below where that one's shorter
// code is worth the error.
DCEXT_INLINE void round_column(const RoundColumns& call, int64_t col, int64_t row, int64_t n) {
  const float step = call.step[col], inverse = 1.0f / step;
  const int64_t at = col * call.rows + row;
  const float* target = call.target + at;
  const float* weight = call.weight + at;
  float* error = call.error + at;
  int8_t* q = call.q + at;
  DCEXT_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const float scaled = target[j] * inverse;
    const float absolute = scaled < 0 ? -scaled : scaled;
    const float magnitude = absolute < kMaxLevel ? absolute : kMaxLevel;  // NaN too becomes a level
    const float nearest = (magnitude + kRounder) - kRounder;
    const float rise = nearest - magnitude;
    const float level =
        nearest - (rise > 0.5f - call.pull[static_cast<int32_t>(nearest)] ? 1.0f : 0.0f);
    const float value = scaled < 0 ? -level : level;
    q[j] = static_cast<int8_t>(static_cast<int32_t>(value));
    error[j] = weight[j] - value * step;
  }
}

DCEXT_INLINE void round_rows(const RoundColumns& call, int64_t row, int64_t n) {
  for (int64_t col = call.cols - 1; col >= 0; --col) {
    round_column(call, col, row, n);
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
    round_rows(call, row, kLanes);
  } else {
    round_rows(call, row, n);
  }
}

void round_lanes_baseline(const RoundColumns& call, int64_t row) { round_lanes(call, row); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) void round_lanes_avx2(const RoundColumns& call, int64_t row) {
  round_lanes(call, row);
}
#endif

}  // namespace

void round_columns(const RoundColumns& call, Executor& executor) {
  auto* lanes = &round_lanes_baseline;
#if defined(__x86_64__)
  if (call.isa != Isa::kScalar) lanes = &round_lanes_avx2;
#endif
  executor.run((call.rows + kLanes - 1) / kLanes,
               [&](int64_t index, int) { lanes(call, index * kLanes); });
}

}  // namespace dcext
