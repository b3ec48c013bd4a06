// Included once for each instruction set, behind its kernels: the table of them, whose products with plain INT8 weights
// are named by the caller. Evaluated when it is compiled.

namespace dcext {
namespace {

constexpr GemmKernels table_of(Isa isa, decltype(GemmKernels::packed_nbytes) nbytes_of_packed,
                               decltype(GemmKernels::pack) pack_tokens,
                               decltype(GemmKernels::multiply) multiply_panel,
                               int64_t most_packed_tokens) {
  return {
      .isa = isa,
      .quantize = quantize,
      .packed_nbytes = nbytes_of_packed,
      .pack = pack_tokens,
      .multiply = multiply_panel,
      .most_packed_tokens = most_packed_tokens,
      .multiply_packed = multiply_packed,
      .dequantize = dequantize,
      .dequantize_wide = dequantize_wide,
      .multiply_weight_only = multiply_weight_only,
      .widen = widen,
      .dequantize_row = dequantize_row,
  };
}

}  // namespace
}  // namespace dcext
