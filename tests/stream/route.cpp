#include "route.h"

#include <utility>

namespace dcext::stress {

Route::Route(int64_t num_units, uint64_t seed) : num_units_(num_units), random_(seed) { choose(); }

void Route::choose() {
  kind_ = static_cast<Kind>(random_.below(static_cast<uint64_t>(Kind::kCount)));
  left_ = random_.between(1, 40 * num_units_);
  fill_cycle();
  at_ = 0;
}

void Route::fill_cycle() {
  cycle_.clear();
  const bool repeats = random_.one_in(4), shares = random_.one_in(3), reversed = random_.one_in(6);
  for (int64_t i = 0; i < num_units_; ++i) {
    const int64_t unit = reversed ? num_units_ - 1 - i : i;
    cycle_.push_back(unit);
    if (repeats) cycle_.push_back(unit);
    if (shares) cycle_.push_back(0);  // a layer that all others share
  }
}

int64_t Route::next() {
  if (left_-- == 0) choose();
  const size_t n = cycle_.size();
  if (kind_ == Kind::kRandom) return random_.between(0, num_units_ - 1);
  if (kind_ == Kind::kSwapping && random_.one_in(8)) {
    std::swap(cycle_[random_.below(n)], cycle_[random_.below(n)]);
  }
  if (kind_ == Kind::kSkipping && random_.one_in(4)) at_ += random_.below(3);
  return cycle_[at_++ % n];
}

}  // namespace dcext::stress
