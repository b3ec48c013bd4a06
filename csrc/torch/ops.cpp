#include <torch/library.h>

#include "torch/ops_common.h"
#include "torch/ops_device_stream.h"
#include "torch/ops_gradient.h"
#include "torch/ops_layers.h"
#include "torch/ops_quantize.h"
#include "torch/ops_seek.h"
#include "torch/ops_stream.h"

namespace dcext {
namespace {

at::Tensor encode_op(const at::Tensor& qweight, c10::string_view codec, int64_t level,
                     int64_t slab_cols) {
  return encode(qweight, codec, level, slab_cols);
}

void decode_out_op(const at::Tensor& payload, int64_t row_begin, int64_t row_end, int64_t col_begin,
                   int64_t col_end, int64_t num_threads, bool verify, at::Tensor out) {
  decode_out(payload, Region{row_begin, row_end, col_begin, col_end}, num_threads,
             static_cast<Verify>(verify), out);
}

}  // namespace
}  // namespace dcext

// Shapes, dtypes and errors are documented on the Python functions of dcext/ops.py.
TORCH_LIBRARY(dcext, m) {
  m.def("encode(Tensor qweight, str codec, int level, int slab_cols) -> Tensor");
  m.def(
      "decode_out(Tensor payload, int row_begin, int row_end, int col_begin, int col_end, "
      "int num_threads, bool verify, Tensor(a!) out) -> ()");
  m.def(
      "decode_indexed_(Tensor[] payloads, Tensor[] indices, Tensor(a!)[] outs, "
      "Tensor(b!) failures) -> ()");
  m.def("fetch_(int stream, int unit, Tensor(a!) slot) -> ()");
  m.def("fetched_(int stream, int unit, Tensor(a!) slot, Tensor? after=None) -> ()");
  m.def(
      "linear(Tensor x, Tensor payload, Tensor row_scale, Tensor? col_scale, Tensor? bias, "
      "str activations) -> Tensor");
  m.def(
      "embedding(Tensor indices, Tensor payload, Tensor row_scale, Tensor? col_scale, "
      "int embedding_dim, ScalarType dtype) -> Tensor");
  m.def(
      "linear_streamed(Tensor x, int stream, int unit, Tensor row_scale, Tensor? col_scale, "
      "Tensor? bias, str activations) -> Tensor");
  m.def(
      "embedding_streamed(Tensor indices, int stream, int unit, Tensor row_scale, "
      "Tensor? col_scale, int embedding_dim, ScalarType dtype) -> Tensor");
  m.def(
      "linear_input_grad(Tensor grad, Tensor payload, Tensor row_scale, Tensor? col_scale, "
      "SymInt in_features) -> Tensor");
  m.def(
      "linear_streamed_input_grad(Tensor grad, int stream, int unit, Tensor row_scale, "
      "Tensor? col_scale, SymInt in_features) -> Tensor");
  m.def(
      "dequantize_weight(Tensor payload, Tensor row_scale, Tensor? col_scale, SymInt in_features, "
      "ScalarType dtype) -> Tensor");
  m.def("quantize_activations(Tensor x, Tensor? col_scale) -> (Tensor, Tensor)");
  m.def(
      "dequantize(Tensor acc, Tensor row_scale, Tensor act_scale, Tensor? bias, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "round_columns_(Tensor weight, Tensor(a!) target, Tensor feedback, Tensor step, Tensor pull, "
      "Tensor(b!) q, Tensor(c!) error, Tensor? row_feedback=None, Tensor? nearest=None, "
      "int panel_rows=0) -> ()");
}

TORCH_LIBRARY_IMPL(dcext, CPU, m) {
  m.impl("encode", &dcext::encode_op);
  m.impl("decode_out", &dcext::decode_out_op);
  m.impl("decode_indexed_", &dcext::decode_indexed_cpu);
  m.impl("fetch_", &dcext::fetch_cpu);
  m.impl("fetched_", &dcext::fetched_cpu);
  m.impl("linear", &dcext::linear);
  m.impl("embedding", &dcext::embedding);
  m.impl("linear_streamed", &dcext::linear_streamed);
  m.impl("embedding_streamed", &dcext::embedding_streamed);
  m.impl("linear_input_grad", &dcext::linear_input_grad);
  m.impl("linear_streamed_input_grad", &dcext::linear_streamed_input_grad);
  m.impl("dequantize_weight", &dcext::dequantize_weight);
  m.impl("quantize_activations", &dcext::quantize_activations);
  m.impl("dequantize", &dcext::dequantize);
  m.impl("round_columns_", &dcext::round_columns_op);
}
