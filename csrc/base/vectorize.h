#pragma once

// For loops that are compiled once per instruction set: a body that must be inlined into each, and a promise that the
// iterations of the loop below do not depend on each other.

#define DCEXT_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define DCEXT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DCEXT_INDEPENDENT _Pragma("GCC ivdep")
#endif
