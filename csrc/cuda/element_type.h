#pragma once

namespace dcext {

/** dtype of the floating-point operands of a CUDA kernel. */
enum class ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace dcext
