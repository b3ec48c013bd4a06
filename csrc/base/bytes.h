#pragma once

#include <cstdint>
#include <cstring>

namespace dcext {

/** Little-endian integers in files, whatever the alignment. The library builds on little-endian hosts only. */
template <typename T>
T load_le(const uint8_t* src) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "payloads are little-endian");
  T value;
  std::memcpy(&value, src, sizeof(T));
  return value;
}

template <typename T>
void store_le(uint8_t* dst, T value) {
  std::memcpy(dst, &value, sizeof(T));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr uint64_t align_up(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace dcext
