#pragma once

// A file of kernels defines DCEXT_TARGET, as "avx2,fma", and includes this header: everything between
// DCEXT_TARGET_BEGIN and DCEXT_TARGET_END is compiled for that instruction set, without per-file compiler flags.
// Standard headers come before: their inline functions must stay baseline code. Tables of kernels come after: nothing
// that may run at load time is compiled for more than the baseline.

#define DCEXT_PRAGMA_TEXT(text) _Pragma(#text)
#define DCEXT_PRAGMA(text) DCEXT_PRAGMA_TEXT(text)
#if !defined(DCEXT_TARGET)
#define DCEXT_LAMBDA __attribute__((always_inline))
#elif defined(__clang__)
#define DCEXT_TARGET_BEGIN \
  DCEXT_PRAGMA(clang attribute push(__attribute__((target(DCEXT_TARGET))), apply_to = function))
#define DCEXT_TARGET_END DCEXT_PRAGMA(clang attribute pop)
#else
#define DCEXT_TARGET_BEGIN DCEXT_PRAGMA(GCC push_options) DCEXT_PRAGMA(GCC target(DCEXT_TARGET))
#define DCEXT_TARGET_END DCEXT_PRAGMA(GCC pop_options)
#endif

// Between the parameters and the body of a lambda. Neither compiler's pragma reaches lambdas inside templates.
#if defined(DCEXT_TARGET)
#define DCEXT_LAMBDA __attribute__((always_inline, target(DCEXT_TARGET)))
#endif
#define DCEXT_ALWAYS_INLINE __attribute__((always_inline))
