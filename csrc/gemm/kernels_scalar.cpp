// No vector intrinsics: what every machine runs, and what the other kernels are tested against.

#include <cstring>
#include <utility>

#include "base/target_pragmas.h"
#include "gemm/kernel_table.h"

namespace dcext {
namespace {

#include "base/unroll_body.h"

struct Lanes {
  static constexpr int kTokens = 1;
  struct Vector {
    float lanes[16];
  };

  static Vector zero() { return {}; }
  static Vector load(const float* p) {
    Vector v;
    std::memcpy(v.lanes, p, sizeof(v.lanes));
    return v;
  }
  static void store(float* p, const Vector& v) { std::memcpy(p, v.lanes, sizeof(v.lanes)); }
  static Vector load_weights(const int8_t* p) { return load_weights_tail(p, 16); }
  static Vector load_weights_tail(const int8_t* p, int64_t n) {
    Vector v = {};
    for (int64_t i = 0; i < n; ++i) v.lanes[i] = static_cast<float>(p[i]);
    return v;
  }
  static Vector add_product(Vector sum, const Vector& a, const Vector& b) {
    for (int i = 0; i < 16; ++i) sum.lanes[i] += a.lanes[i] * b.lanes[i];
    return sum;
  }
  static float tree_sum(Vector v) {
    for (int width = 8; width >= 1; width /= 2) {
      for (int i = 0; i < width; ++i) v.lanes[i] += v.lanes[i + width];
    }
    return v.lanes[0];
  }
};

#include "gemm/elementwise_body.h"
#include "gemm/weight_only_body.h"

int64_t packed_nbytes(int64_t tokens, int64_t cols) { return (tokens * cols + 63) / 64 * 64; }

void pack(const int8_t* q, int64_t ld, int64_t, int64_t cols, int64_t begin, int64_t end,
          uint8_t* packed) {
  for (int64_t m = begin; m < end; ++m) {
    std::memcpy(packed + m * cols, q + m * ld, static_cast<size_t>(cols));
  }
}

void multiply(const WeightPanel& panel, const uint8_t* packed, int64_t tokens, int32_t* acc) {
  const auto* x = reinterpret_cast<const int8_t*>(packed);
  for (int64_t n = 0; n < panel.rows; ++n) {
    const int8_t* w = panel.data + n * panel.ld;
    for (int64_t m = 0; m < tokens; ++m) {
      int32_t sum = 0;
      for (int64_t k = 0; k < panel.cols; ++k) {
        sum += int32_t{w[k]} * int32_t{x[m * panel.cols + k]};
      }
      acc[m * panel.rows + n] = sum;
    }
  }
}

struct PackedDot {
  static constexpr int64_t kRows = 16;
  static constexpr uint32_t kOffset = 0;
  static constexpr int kMostTokens = 4, kDenseTokens = 4;
  struct Acc {
    int32_t lanes[kRows];
  };
  struct Weights {
    int8_t quads[kRows][4];
  };

  template <int kWidth>
  struct Lookup {
    const int8_t* table;

    template <int kVector>
    Weights weights(const uint8_t* group) const {
      Weights w;
      unpack_vector(group, kWidth, table, kVector, w.quads[0]);
      return w;
    }
  };

  static Acc zero() { return {}; }
  static Acc add(Acc a, const Acc& b) {
    for (int r = 0; r < kRows; ++r) a.lanes[r] += b.lanes[r];
    return a;
  }
  static Acc dot(Acc acc, const Weights& w, const int8_t* x) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < 4; ++c) acc.lanes[r] += int32_t{w.quads[r][c]} * int32_t{x[c]};
    }
    return acc;
  }
  static Acc fill(int32_t i) {
    Acc acc;
    for (int32_t& lane : acc.lanes) lane = i;
    return acc;
  }
  static Acc load(const int32_t* p) {
    Acc acc;
    std::memcpy(acc.lanes, p, sizeof(acc.lanes));
    return acc;
  }
  static void store_weights(uint8_t* p, const Weights& w) { std::memcpy(p, &w, sizeof(w)); }
  static Weights load_weights(const uint8_t* p) {
    Weights w;
    std::memcpy(&w, p, sizeof(w));
    return w;
  }
  static void store(int32_t* p, const Acc& acc) { std::memcpy(p, acc.lanes, sizeof(acc.lanes)); }
};

#include "gemm/packed_body.h"

}  // namespace
}  // namespace dcext

#include "gemm/table_body.h"

const dcext::GemmKernels dcext::kScalarKernels =
    table_of(Isa::kScalar, packed_nbytes, pack, multiply, dcext::kAnyTokens);
