#pragma once

#include <cstdint>
#include <initializer_list>

namespace dcext::fuzz {

/** Reproducible random numbers (splitmix64): a seed names a run on any machine. */
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  /** @param n   at least 1. */
  uint64_t below(uint64_t n) { return next() % n; }
  /** Both ends may come. */
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(below(static_cast<uint64_t>(high - low + 1)));
  }
  bool one_in(uint64_t n) { return below(n) == 0; }
  uint8_t byte() { return static_cast<uint8_t>(next() >> 56); }
  int64_t pick(std::initializer_list<int64_t> choices) {
    return choices.begin()[below(choices.size())];
  }

 private:
  uint64_t state_;
};

}  // namespace dcext::fuzz
