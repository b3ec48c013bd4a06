#include "torch/ops_quantize.h"

#include "quantize/round_columns.h"
#include "torch/ops_common.h"
#include "torch/torch_executor.h"

namespace dcext {
namespace {

constexpr const char* kOp = "dcext::round_columns_";

void check_matrix(const char* argument, const at::Tensor& matrix, int64_t rows, int64_t cols,
                  at::ScalarType dtype) {
  TORCH_CHECK_TYPE(matrix.scalar_type() == dtype, kOp, ": ", argument, ": expected ", dtype,
                   ", got ", matrix.scalar_type());
  TORCH_CHECK_VALUE(matrix.is_cpu() && matrix.is_contiguous() && matrix.dim() == 2 &&
                        matrix.size(0) == rows && matrix.size(1) == cols,
                    kOp, ": ", argument, ": expected a contiguous CPU tensor of shape [", rows,
                    ", ", cols, "], got shape ", matrix.sizes(), " on ", matrix.device());
}

void set_row_feedback(const at::Tensor& row_feedback, RoundColumns& call) {
  TORCH_CHECK_TYPE(row_feedback.scalar_type() == at::kFloat, kOp,
                   ": row_feedback: expected Float, got ", row_feedback.scalar_type());
  const int64_t size = row_feedback.dim() == 3 ? row_feedback.size(1) : 0;
  TORCH_CHECK_VALUE(
      size > 0 && size <= kMaxRowBlock && size % kRowGroup == 0 && row_feedback.size(2) == size &&
          row_feedback.size(0) == (call.rows + size - 1) / size && row_feedback.is_cpu() &&
          row_feedback.is_contiguous(),
      kOp, ": row_feedback: expected a contiguous CPU tensor of shape [blocks, size, size] for ",
      call.rows, " rows, size a multiple of ", kRowGroup, " up to ", kMaxRowBlock, ", got shape ",
      row_feedback.sizes(), " on ", row_feedback.device());
  call.row_feedback = row_feedback.const_data_ptr<float>();
  call.row_block = size;
}

void set_nearest(const at::Tensor& nearest, int64_t panel_rows, RoundColumns& call) {
  TORCH_CHECK_VALUE(panel_rows > 0, kOp, ": panel_rows: expected at least 1, got ", panel_rows);
  const int64_t panels = call.rows / panel_rows + (call.rows % panel_rows != 0 ? 1 : 0);
  check_matrix("nearest", nearest, panels, kTableSize, at::kChar);
  call.nearest = nearest.const_data_ptr<int8_t>();
  call.panel_rows = panel_rows;
}

}  // namespace

void round_columns_op(const at::Tensor& weight, at::Tensor target, const at::Tensor& feedback,
                      const at::Tensor& step, const at::Tensor& pull, at::Tensor q,
                      at::Tensor error, const std::optional<at::Tensor>& row_feedback,
                      const std::optional<at::Tensor>& nearest, int64_t panel_rows) {
  TORCH_CHECK_VALUE(weight.dim() == 2, kOp, ": weight: expected 2 dimensions, got ", weight.dim());
  const int64_t cols = weight.size(0), rows = weight.size(1);
  check_matrix("weight", weight, cols, rows, at::kFloat);
  check_matrix("target", target, cols, rows, at::kFloat);
  check_matrix("feedback", feedback, cols, cols, at::kFloat);
  check_matrix("q", q, cols, rows, at::kChar);
  check_matrix("error", error, cols, rows, at::kFloat);
  RoundColumns call{};
  call.rows = rows;
  call.cols = cols;
  call.weight = weight.const_data_ptr<float>();
  call.target = target.mutable_data_ptr<float>();
  call.feedback = feedback.const_data_ptr<float>();
  call.step = vector_data(kOp, "step", step, cols, at::kCPU);
  call.pull = vector_data(kOp, "pull", pull, kNumLevels, at::kCPU);
  call.q = q.mutable_data_ptr<int8_t>();
  call.error = error.mutable_data_ptr<float>();
  if (row_feedback.has_value()) set_row_feedback(*row_feedback, call);
  if (nearest.has_value()) set_nearest(*nearest, panel_rows, call);
  call.isa = selected_isa();
  TorchExecutor executor;
  round_columns(call, executor);
}

}  // namespace dcext
