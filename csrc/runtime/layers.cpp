#include "runtime/layers.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "base/scratch.h"
#include "codec/packed.h"
#include "codec/payload_decoder.h"
#include "codec/zstd_frame.h"

namespace dcext {
namespace {

constexpr int64_t kMaxTokens = 2048;  // per pass over the weights; bounds the scratch

// Runs on the thread that calls; for work inside a task.
class SerialExecutor final : public Executor {
 public:
  int num_workers() const override { return 1; }
  void run(int64_t num_tasks, FunctionRef<void(int64_t, int)> task) override {
    for (int64_t i = 0; i < num_tasks; ++i) task(i, 0);
  }
};

// The first failure of a parallel loop, by chunk.
class FailureSlot {
 public:
  void record(const Failure& failure) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.ok() || failure.chunk < failure_.chunk) failure_ = failure;
    lowest_.store(failure_.chunk, std::memory_order_relaxed);
  }
  /** After the loop. */
  const Failure& get() const { return failure_; }
  /** Inside it: whether a chunk need not be looked at, since an earlier one has failed. */
  bool before(int64_t chunk) const { return lowest_.load(std::memory_order_relaxed) < chunk; }

 private:
  std::mutex mutex_;
  Failure failure_;
  std::atomic<int64_t> lowest_{INT64_MAX};
};

Failure out_of_memory(int64_t nbytes) {
  return Failure{Status::kOutOfMemory, "scratch bytes", -1, static_cast<uint64_t>(nbytes), 0};
}

// A panel's chunks, held while this lives: where they rest, or as a source brings them.
class HeldPanel {
 public:
  HeldPanel(const PayloadView& weight, PanelSource* source, int64_t index)
      : view_(weight), source_(source), index_(index) {
    if (source_ != nullptr) failure_ = source_->acquire(index_, &view_);
  }
  ~HeldPanel() {
    if (source_ != nullptr && failure_.ok()) source_->release(index_);
  }
  HeldPanel(const HeldPanel&) = delete;
  HeldPanel& operator=(const HeldPanel&) = delete;

  const Failure& failure() const { return failure_; }
  const PayloadView& view() const { return view_; }
  int64_t index() const { return index_; }
  /** What rests was verified when it was loaded. */
  Verify verify() const { return static_cast<Verify>(source_ != nullptr); }

 private:
  PayloadView view_;
  PanelSource* source_;
  int64_t index_;
  Failure failure_;
};

// A pass of a source over all panels, or over some.
class Pass {
 public:
  explicit Pass(PanelSource* source) : source_(source) {
    if (source_ != nullptr) source_->begin();
  }
  Pass(PanelSource* source, const std::vector<int64_t>& panels) : source_(source) {
    if (source_ != nullptr) source_->begin_some(panels);
  }
  ~Pass() {
    if (source_ != nullptr) source_->end();
  }
  Pass(const Pass&) = delete;
  Pass& operator=(const Pass&) = delete;

  /** Leaves a panel out. */
  void skip(int64_t panel) const {
    if (source_ != nullptr) source_->release(panel);
  }

 private:
  PanelSource* source_;
};

// The rows of a panel, in place for a raw payload of one slab, else decoded into this thread's scratch.
Failure load_panel(const HeldPanel& held, WeightPanel* panel) {
  thread_local Scratch scratch;
  if (!held.failure().ok()) return held.failure();
  const PayloadView& view = held.view();
  const PayloadLayout& layout = view.layout();
  const int64_t first_chunk = held.index() * layout.num_slabs();
  const Tile tile = view.tile(first_chunk);
  const Chunk chunk = view.chunk(first_chunk);
  *panel = {nullptr, layout.cols, tile.rows, layout.cols};
  const bool one_slab = layout.num_slabs() == 1;
  if (one_slab && chunk.encoding == Encoding::kRaw) {
    panel->data = reinterpret_cast<const int8_t*>(view.data() + chunk.offset);
    return held.verify() == Verify::kYes ? view.verify_chunk(first_chunk) : Failure{};
  }
  const int64_t nbytes = tile.rows * layout.cols + kFrameSlack;
  auto* decoded = reinterpret_cast<int8_t*>(scratch.reserve(nbytes));
  if (decoded == nullptr) return out_of_memory(nbytes);
  panel->data = decoded;
  if (one_slab) return decode_chunk(view, first_chunk, held.verify(), decoded, nbytes);
  SerialExecutor serial;
  const Region region{tile.row, tile.row + tile.rows, 0, layout.cols};
  return decode_region(view, region, held.verify(), decoded, layout.cols, serial);
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

// The activations of one call, quantized, in this thread's scratch.
struct QuantizedTokens {
  PackedInput input;
  const uint8_t* packed;  // null if no panel is dense
  const float* scale;
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
  const int64_t packed_nbytes = kinds.dense ? kernels.packed_nbytes(call.tokens, cols) : 64;
  auto* q = reinterpret_cast<int8_t*>(q_scratch.reserve(q_nbytes));
  uint8_t* packed = packed_scratch.reserve(packed_nbytes);
  auto* scale = reinterpret_cast<float*>(scale_scratch.reserve(call.tokens * sizeof(float)));
  auto* sums = reinterpret_cast<int32_t*>(sum_scratch.reserve(call.tokens * sizeof(int32_t)));
  if (q == nullptr || packed == nullptr || scale == nullptr || sums == nullptr)
    return out_of_memory(q_nbytes + packed_nbytes);

  executor.run(ceil_div(call.tokens, kPackTokens), [&](int64_t block, int) {
    const int64_t begin = block * kPackTokens, end = std::min(call.tokens, begin + kPackTokens);
    for (int64_t m = begin; m < end; ++m) {
      int8_t* token = q + m * ld;
      kernels.quantize(token_at(call, m), call.type, call.col_scale, cols, token, scale + m);
      std::fill(token + cols, token + ld, int8_t{0});
      if (kinds.direct) sums[m] = sum_of(token, cols);
    }
    if (kinds.dense) kernels.pack(q, ld, call.tokens, cols, begin, end, packed);
  });
  *out = {{q, ld, sums}, kinds.dense ? packed : nullptr, scale};
  return {};
}

// Sums of one panel with all tokens: acc[m * rows + n].
Failure multiply_panel(const LinearCall& call, const GemmKernels& kernels, int64_t index,
                       const QuantizedTokens& tokens, int64_t* rows, int32_t** acc) {
  thread_local Scratch acc_scratch;
  const int64_t chunk = index * call.weight->layout().num_slabs();
  *rows = call.weight->tile(chunk).rows;
  const int64_t acc_nbytes = call.tokens * *rows * static_cast<int64_t>(sizeof(int32_t));
  *acc = reinterpret_cast<int32_t*>(acc_scratch.reserve(acc_nbytes));
  if (*acc == nullptr) return out_of_memory(acc_nbytes);
  const HeldPanel held(*call.weight, call.source, index);
  if (!held.failure().ok()) return held.failure();
  if (is_direct(call, kernels, index)) {
    const PackedTile tile = packed_tile(held.view(), index);
    if (!counts_add_up(tile)) return Failure{Status::kCorrupt, "exceptions", index, 0, 0};
    if (held.verify() == Verify::kYes) {
      if (const Failure bad = held.view().verify_chunk(index); !bad.ok()) return bad;
    }
    kernels.multiply_packed(tile, tokens.input, call.tokens, *acc);
    return {};
  }
  WeightPanel panel;
  if (const Failure bad = load_panel(held, &panel); !bad.ok()) return bad;
  kernels.multiply(panel, tokens.packed, call.tokens, *acc);
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
    int64_t rows;
    int32_t* acc;
    const Failure bad = multiply_panel(call, kernels, index, tokens, &rows, &acc);
    if (!bad.ok()) return failure.record(bad);
    kernels.dequantize(acc, call.tokens, rows, tokens.scale,
                       panel_output(call, index * layout.panel_rows));
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
  if (x == nullptr) return out_of_memory(x_nbytes);

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
    if (rows == nullptr) return failure.record(out_of_memory(row_nbytes));
    kernels.multiply_weight_only(panel, x, call.tokens, rows,
                                 panel_output(call, index * layout.panel_rows));
  });
  return failure.get();
}

}  // namespace

Failure run_linear(const LinearCall& call, Executor& executor) {
  for (int64_t begin = 0; begin < call.tokens; begin += kMaxTokens) {
    LinearCall part = call;
    part.tokens = std::min(kMaxTokens, call.tokens - begin);
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
