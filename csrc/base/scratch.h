#pragma once

#include <cstdint>
#include <cstdlib>

namespace dcext {

/** A 64-byte aligned work buffer that grows and is reused; its content is lost when it grows. */
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  /** At least `nbytes` bytes, valid until the next call. Null where the system has no memory left. */
  uint8_t* reserve(int64_t nbytes) {
    if (nbytes <= capacity_) return data_;
    std::free(data_);
    const int64_t rounded = (nbytes + 63) / 64 * 64;
    data_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(rounded)));
    capacity_ = data_ == nullptr ? 0 : rounded;
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace dcext
