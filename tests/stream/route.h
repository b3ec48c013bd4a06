#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "fuzz/fuzz_random.h"

namespace dcext::stress {

/** The order in which a thread uses units: one of several kinds, exchanged for another now and then. */
class Route {
 public:
  Route(int64_t num_units, uint64_t seed);

  int64_t next();

 private:
  enum class Kind { kCyclic, kSwapping, kRandom, kSkipping, kCount };

  void choose();
  void fill_cycle();

  const int64_t num_units_;
  fuzz::Random random_;
  Kind kind_ = Kind::kCyclic;
  std::vector<int64_t>
      cycle_;  // may have a unit several times, with different successors, or twice in a row
  size_t at_ = 0;
  int64_t left_ = 0;  // steps until another kind
};

}  // namespace dcext::stress
