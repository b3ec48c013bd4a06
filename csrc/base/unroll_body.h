// No include guard: included in the unnamed namespace of each instruction set, so that it is compiled for it.

template <typename Function, int... kIndices>
inline DCEXT_ALWAYS_INLINE void unroll_indices(std::integer_sequence<int, kIndices...>,
                                               const Function& function) {
  (function(std::integral_constant<int, kIndices>{}), ...);
}

// function(0), ..., function(kCount - 1) with indices that are constants from the start: arrays of vectors that are
// only indexed so live in registers. (GCC spills the accumulators of loops that it unrolls itself.)
template <int kCount, typename Function>
inline DCEXT_ALWAYS_INLINE void unroll(const Function& function) {
  unroll_indices(std::make_integer_sequence<int, kCount>{}, function);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
