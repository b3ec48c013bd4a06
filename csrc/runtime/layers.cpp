#include "runtime/layers.h"

#include <algorithm>
#include <vector>

#include "base/scratch.h"
#include "codec/packed.h"
#include "runtime/panels.h"

namespace dcext {
namespace {

// Tokens per pass over the weights, and activations, which are fewer tokens of wide layers: they bound the scratch.
constexpr int64_t kMaxTokens = 2048;
constexpr int64_t kMaxActivations = kMaxTokens * kMaxSumCols;

int64_t most_tokens(int64_t cols) {
  return std::clamp(kMaxActivations / cols / kPackTokens * kPackTokens, kPackTokens, kMaxTokens);
}

PanelOutput panel_output(const LinearCall& call, int64_t row) {
  const int64_t rows = call.weight->layout().rows;
  return {call.row_scale + row, call.bias == nullptr ? nullptr : call.bias + row,
          static_cast<uint8_t*>(call.y) + row * element_nbytes(call.type), rows, call.type};
}

const uint8_t* token_at(const LinearCall& call, int64_t m) {
  return static_cast<const uint8_t*>(call.x) +
         m * call.weight->layout().cols * element_nbytes(call.type);
}

// What the panels of a payload need of the activations.
struct PanelKinds {
  bool direct = false;  // some are multiplied as they are packed
  bool dense = false;   // some are multiplied from int8
};

bool is_direct(const LinearCall& call, const GemmKernels& kernels, int64_t panel) {
  return call.tokens <= kernels.most_packed_tokens && call.weight->layout().num_slabs() == 1 &&
         call.weight->chunk(panel).encoding == Encoding::kPacked;
}

PanelKinds panel_kinds(const LinearCall& call, const GemmKernels& kernels) {
  const PayloadLayout& layout = call.weight->layout();
  if (layout.codec != Codec::kPacked || call.tokens > kernels.most_packed_tokens)
    return {false, true};
  PanelKinds kinds;
  for (int64_t i = 0; i < layout.num_panels(); ++i) {
    (is_direct(call, kernels, i) ? kinds.direct : kinds.dense) = true;
  }
  return kinds;
}

// Columns whose products are summed in int32. A layer has one range unless it is wide.
struct ColumnRange {
  int64_t begin, cols, packed_at;  // packed_at: where the activations that are packed for it lie
};

struct ColumnRanges {
  int64_t cols, range_nbytes;  // range_nbytes: packed activations of a whole range

  int64_t count() const { return ceil_div(cols, kMaxSumCols); }
  ColumnRange at(int64_t i) const {
    const int64_t begin = i * kMaxSumCols;
    return {begin, std::min(kMaxSumCols, cols - begin), i * range_nbytes};
  }
};

ColumnRanges column_ranges(const LinearCall& call, const GemmKernels& kernels) {
  const int64_t cols = call.weight->layout().cols;
  return {cols, kernels.packed_nbytes(call.tokens, std::min(cols, kMaxSumCols))};
}

// The activations of one call, quantized, in this thread's scratch.
struct QuantizedTokens {
  PackedInput input;
  const uint8_t* packed;  // null if no panel is dense
  const float* scale;
  ColumnRanges ranges;
};

int32_t sum_of(const int8_t* q, int64_t n) {
  int32_t sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += q[k];
  return sum;
}

Failure quantize_tokens(const LinearCall& call, const GemmKernels& kernels, const PanelKinds& kinds,
                        Executor& executor, QuantizedTokens* out) {
  thread_local Scratch q_scratch, packed_scratch, scale_scratch, sum_scratch;
  const int64_t cols = call.weight->layout().cols;
  // Distances that are multiples of a power of two would put all tokens in one set of the L1 cache.
  const int64_t ld = packed_cols(cols) + (kinds.direct && call.tokens > 1 ? 64 : 0);
  // Behind the last token: an exception's column, whatever the payload says, stays inside.
  const int64_t q_nbytes = call.tokens * ld + (kinds.direct ? kMaxPackedCols + kGroupCols : 0);
  const ColumnRanges ranges = column_ranges(call, kernels);
  const int64_t packed_nbytes = kinds.dense ? ranges.count() * ranges.range_nbytes : 64;
  auto* q = reinterpret_cast<int8_t*>(q_scratch.reserve(q_nbytes));
  uint8_t* packed = packed_scratch.reserve(packed_nbytes);
  auto* scale = reinterpret_cast<float*>(scale_scratch.reserve(call.tokens * sizeof(float)));
  auto* sums = reinterpret_cast<int32_t*>(sum_scratch.reserve(call.tokens * sizeof(int32_t)));
  if (q == nullptr || packed == nullptr || scale == nullptr || sums == nullptr)
    return out_of_scratch(q_nbytes + packed_nbytes);

  executor.run(ceil_div(call.tokens, kPackTokens), [&](int64_t block, int) {
    const int64_t begin = block * kPackTokens, end = std::min(call.tokens, begin + kPackTokens);
    for (int64_t m = begin; m < end; ++m) {
      int8_t* token = q + m * ld;
      kernels.quantize(token_at(call, m), call.type, call.col_scale, cols, token, scale + m);
      std::fill(token + cols, token + ld, int8_t{0});
      if (kinds.direct) sums[m] = sum_of(token, cols);
    }
    for (int64_t i = 0; kinds.dense && i < ranges.count(); ++i) {
      const ColumnRange range = ranges.at(i);
      kernels.pack(q + range.begin, ld, call.tokens, range.cols, begin, end,
                   packed + range.packed_at);
    }
  });
  *out = {{q, ld, sums}, kinds.dense ? packed : nullptr, scale, ranges};
  return {};
}

// Sums of one panel with all tokens: [m * rows + n].
struct PanelSums {
  int64_t rows;
  int32_t* sums;
  int64_t*
      wide_sums;  // takes the place of `sums` in a layer of several ranges of columns, else null
};

Failure reserve_sums(const LinearCall& call, int64_t rows, bool wide, PanelSums* out) {
  thread_local Scratch sum_scratch, wide_scratch;
  const int64_t count = call.tokens * rows;
  const int64_t nbytes = count * int64_t{sizeof(int32_t)};
  const int64_t wide_nbytes = wide ? count * int64_t{sizeof(int64_t)} : 0;
  out->rows = rows;
  out->sums = reinterpret_cast<int32_t*>(sum_scratch.reserve(nbytes));
  out->wide_sums = wide ? reinterpret_cast<int64_t*>(wide_scratch.reserve(wide_nbytes)) : nullptr;
  if (out->sums == nullptr || (wide && out->wide_sums == nullptr))
    return out_of_scratch(nbytes + wide_nbytes);
  return {};
}

void multiply_dense(const LinearCall& call, const GemmKernels& kernels, const WeightPanel& panel,
                    const QuantizedTokens& tokens, const PanelSums& sums) {
  if (sums.wide_sums == nullptr) {
    return kernels.multiply(panel, tokens.packed, call.tokens, sums.sums);
  }
  const int64_t count = call.tokens * sums.rows;
  std::fill_n(sums.wide_sums, count, int64_t{0});
  for (int64_t r = 0; r < tokens.ranges.count(); ++r) {
    const ColumnRange range = tokens.ranges.at(r);
    const WeightPanel part{panel.data + range.begin, panel.ld, panel.rows, range.cols};
    kernels.multiply(part, tokens.packed + range.packed_at, call.tokens, sums.sums);
    for (int64_t i = 0; i < count; ++i) sums.wide_sums[i] += sums.sums[i];
  }
}

Failure multiply_panel(const LinearCall& call, const GemmKernels& kernels, int64_t index,
                       const QuantizedTokens& tokens, PanelSums* sums) {
  const int64_t chunk = index * call.weight->layout().num_slabs();
  const bool wide = tokens.ranges.count() > 1;
  if (const Failure bad = reserve_sums(call, call.weight->tile(chunk).rows, wide, sums); !bad.ok())
    return bad;
  const HeldPanel held(*call.weight, call.source, index);
  if (!held.failure().ok()) return held.failure();
  if (is_direct(call, kernels, index)) {
    const PackedTile tile = packed_tile(held.view(), index);
    if (held.verify() == Verify::kYes) {
      if (const Failure bad = held.view().verify_chunk(index); !bad.ok()) return bad;
    }
    if (const Failure bad = held.check_format(); !bad.ok()) return bad;
    if (!counts_add_up(tile)) return Failure{Status::kCorrupt, "exceptions", index, 0, 0};
    kernels.multiply_packed(tile, tokens.input, call.tokens, sums->sums);
    return {};
  }
  WeightPanel panel;
  if (const Failure bad = load_panel(held, &panel); !bad.ok()) return bad;
  multiply_dense(call, kernels, panel, tokens, *sums);
  return {};
}

Failure run_int8(const LinearCall& call, Executor& executor) {
  const PayloadLayout& layout = call.weight->layout();
  const GemmKernels& kernels = gemm_kernels(call.isa, call.tokens);
  QuantizedTokens tokens;
  if (const Failure bad =
          quantize_tokens(call, kernels, panel_kinds(call, kernels), executor, &tokens);
      !bad.ok()) {
    return bad;
  }
  FailureSlot failure;
  const Pass pass(call.source);
  executor.run(layout.num_panels(), [&](int64_t index, int) {
    if (failure.before(index * layout.num_slabs())) return pass.skip(index);
    PanelSums sums;
    const Failure bad = multiply_panel(call, kernels, index, tokens, &sums);
    if (!bad.ok()) return failure.record(bad);
    const PanelOutput output = panel_output(call, index * layout.panel_rows);
    if (sums.wide_sums != nullptr) {
      kernels.dequantize_wide(sums.wide_sums, call.tokens, sums.rows, tokens.scale, output);
    } else {
      kernels.dequantize(sums.sums, call.tokens, sums.rows, tokens.scale, output);
    }
  });
  return failure.get();
}

Failure run_weight_only(const LinearCall& call, Executor& executor) {
  thread_local Scratch x_scratch;
  const PayloadLayout& layout = call.weight->layout();
  const GemmKernels& kernels = gemm_kernels(call.isa, call.tokens);
  const int64_t stride = weight_only_cols(layout.cols);
  const int64_t x_nbytes = call.tokens * stride * static_cast<int64_t>(sizeof(float));
  auto* x = reinterpret_cast<float*>(x_scratch.reserve(x_nbytes));
  if (x == nullptr) return out_of_scratch(x_nbytes);

  executor.run(call.tokens, [&](int64_t m, int) {
    kernels.widen(token_at(call, m), call.type, call.col_scale, layout.cols, x + m * stride);
  });
  FailureSlot failure;
  const Pass pass(call.source);
  executor.run(layout.num_panels(), [&](int64_t index, int) {
    thread_local Scratch row_scratch;
    if (failure.before(index * layout.num_slabs())) return pass.skip(index);
    const HeldPanel held(*call.weight, call.source, index);
    WeightPanel panel;
    if (const Failure bad = load_panel(held, &panel); !bad.ok()) return failure.record(bad);
    const int64_t row_nbytes = weight_only_scratch_nbytes(layout.cols);
    auto* rows = reinterpret_cast<float*>(row_scratch.reserve(row_nbytes));
    if (rows == nullptr) return failure.record(out_of_scratch(row_nbytes));
    kernels.multiply_weight_only(panel, x, call.tokens, rows,
                                 panel_output(call, index * layout.panel_rows));
  });
  return failure.get();
}

}  // namespace

Failure run_linear(const LinearCall& call, Executor& executor) {
  const int64_t most = most_tokens(call.weight->layout().cols);
  for (int64_t begin = 0; begin < call.tokens; begin += most) {
    LinearCall part = call;
    part.tokens = std::min(most, call.tokens - begin);
    part.x = token_at(call, begin);
    part.y = static_cast<uint8_t*>(call.y) +
             begin * call.weight->layout().rows * element_nbytes(call.type);
    const Failure failure = call.activations == Activations::kInt8
                                ? run_int8(part, executor)
                                : run_weight_only(part, executor);
    if (!failure.ok()) return failure;
  }
  return {};
}

Failure run_embedding(const EmbeddingCall& call, Executor& executor) {
  const PayloadLayout& layout = call.weight->layout();
  std::vector<int64_t> order(static_cast<size_t>(call.count));
  for (int64_t i = 0; i < call.count; ++i) order[i] = i;
  const auto panel_of = [&](int64_t i) { return call.indices[i] / layout.panel_rows; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return panel_of(a) < panel_of(b); });
  std::vector<int64_t> starts;  // of the runs of lookups that share a panel
  std::vector<int64_t> panels;
  for (int64_t i = 0; i < call.count; ++i) {
    if (i != 0 && panel_of(order[i]) == panel_of(order[i - 1])) continue;
    starts.push_back(i);
    panels.push_back(panel_of(order[i]));
  }
  starts.push_back(call.count);

  const GemmKernels& kernels = gemm_kernels(call.isa, 1);
  FailureSlot failure;
  const Pass pass(call.source, panels);
  executor.run(static_cast<int64_t>(panels.size()), [&](int64_t run, int) {
    const int64_t index = panels[run];
    if (failure.before(index * layout.num_slabs())) return pass.skip(index);
    const HeldPanel held(*call.weight, call.source, index);
    WeightPanel panel;
    if (const Failure bad = load_panel(held, &panel); !bad.ok()) return failure.record(bad);
    for (int64_t i = starts[run]; i < starts[run + 1]; ++i) {
      const int64_t row = call.indices[order[i]];
      auto* out =
          static_cast<uint8_t*>(call.out) + order[i] * layout.cols * element_nbytes(call.type);
      kernels.dequantize_row(panel.data + (row - index * layout.panel_rows) * panel.ld, layout.cols,
                             call.row_scale[row], call.col_scale, call.type, out);
    }
  });
  return failure.get();
}

}  // namespace dcext
