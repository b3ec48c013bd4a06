#pragma once

#include <cstdint>

namespace dcext {

/** dtype of activations and outputs. */
enum class ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t element_nbytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

}  // namespace dcext
