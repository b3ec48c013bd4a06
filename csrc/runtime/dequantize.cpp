#include "runtime/dequantize.h"

#include <algorithm>

#include "runtime/panels.h"

namespace dcext {
namespace {

// Chunks in memory that nobody has verified yet, as a memory-mapped payload's.
Failure verify_in_memory(const DequantizeCall& call, int64_t panel) {
  if (call.source != nullptr || call.verify == Verify::kNo) return {};
  const int64_t slabs = call.weight->layout().num_slabs();
  for (int64_t chunk = panel * slabs; chunk < (panel + 1) * slabs; ++chunk) {
    if (const Failure bad = verify_chunk(*call.weight, chunk); !bad.ok()) return bad;
  }
  return {};
}

// The rows of one panel, to `out`.
Failure dequantize_panel(const DequantizeCall& call, const GemmKernels& kernels, int64_t index,
                         uint8_t* out) {
  if (const Failure bad = verify_in_memory(call, index); !bad.ok()) return bad;
  const HeldPanel held(*call.weight, call.source, index);
  WeightPanel panel;
  if (const Failure bad = load_panel(held, &panel); !bad.ok()) return bad;
  const int64_t first = index * call.weight->layout().panel_rows;
  for (int64_t r = 0; r < panel.rows; ++r) {
    kernels.dequantize_row(panel.data + r * panel.ld, panel.cols, call.row_scale[first + r],
                           call.col_scale, call.type,
                           out + r * panel.cols * element_nbytes(call.type));
  }
  return {};
}

}  // namespace

Failure run_dequantize(const DequantizeCall& call, Executor& executor,
                       FunctionRef<void(int64_t row_begin, int64_t row_end)> use) {
  const PayloadLayout& layout = call.weight->layout();
  const GemmKernels& kernels = gemm_kernels(call.isa, 1);
  const int64_t panel_nbytes = layout.panel_rows * layout.cols * element_nbytes(call.type);
  FailureSlot failure;
  const Pass pass(call.source);
  for (int64_t first = 0; first < layout.num_panels(); first += call.block_panels) {
    const int64_t count = std::min(call.block_panels, layout.num_panels() - first);
    executor.run(count, [&](int64_t i, int) {
      const int64_t index = first + i;
      if (failure.before(index * layout.num_slabs())) return pass.skip(index);
      auto* out = static_cast<uint8_t*>(call.out) + i * panel_nbytes;
      const Failure bad = dequantize_panel(call, kernels, index, out);
      if (!bad.ok()) failure.record(bad);
    });
    if (!failure.get().ok()) break;
    use(first * layout.panel_rows, std::min(layout.rows, (first + count) * layout.panel_rows));
  }
  return failure.get();
}

}  // namespace dcext
