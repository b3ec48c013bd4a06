#pragma once

// DCEXT_TARGET_BEGIN("avx2,fma") ... DCEXT_TARGET_END: everything between is compiled for that instruction set, without
// per-file compiler flags. Standard headers come before it: their inline functions must stay baseline code.

#define DCEXT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DCEXT_TARGET_BEGIN(features) \
  DCEXT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DCEXT_TARGET_END DCEXT_PRAGMA(clang attribute pop)
#else
#define DCEXT_TARGET_BEGIN(features) \
  DCEXT_PRAGMA(GCC push_options) DCEXT_PRAGMA(GCC target(features))
#define DCEXT_TARGET_END DCEXT_PRAGMA(GCC pop_options)
#endif

// Loops over registers: arrays of accumulators live in registers only if such loops are gone early.
#if defined(__clang__)
#define DCEXT_UNROLL DCEXT_PRAGMA(clang loop unroll(full))
#else
#define DCEXT_UNROLL DCEXT_PRAGMA(GCC unroll 16)
#endif
