#pragma once

#include <array>
#include <cstdint>
#include <map>

namespace dcext {

/** In which order units are used: at first that of the list, then what was seen. What followed the last two units
 *  follows them again, else what followed the last one. */
class LearntOrder {
 public:
  /** What one user of units used last. */
  struct Position {
    int64_t before = -1, last = -1;

    Position after(int64_t unit) const { return {last, unit}; }
  };

  /** @param num_units   at least 1. */
  explicit LearntOrder(int64_t num_units) : num_units_(num_units) {}

  void learn(Position* position, int64_t unit) {
    if (position->last >= 0) {
      followed_[{position->before, position->last}] = unit;
      followed_[{kAny, position->last}] = unit;
    }
    *position = position->after(unit);
  }

  /** What follows a position at which a unit was used. */
  int64_t expected_after(const Position& position) const {
    for (const int64_t context : {position.before, kAny}) {
      const auto found = followed_.find({context, position.last});
      if (found != followed_.end()) return found->second;
    }
    return (position.last + 1) % num_units_;
  }

 private:
  static constexpr int64_t kAny = -2;  // in place of the unit before the last

  int64_t num_units_;
  std::map<std::array<int64_t, 2>, int64_t> followed_;  // what followed two units
};

}  // namespace dcext
