#include "policy/anneal.h"

#include <cmath>
#include <random>

namespace dcext {
namespace {

// Of the mean time of a unit, what a move may cost at first and at last.
constexpr double kHot = 0.5, kCold = 2e-3;
constexpr int64_t kLookedAt = 32;  // moves that do not fit count as so many steps

class Search {
 public:
  Search(const Tiers& tiers, const std::vector<int64_t>& choice, uint64_t seed)
      : tiers_(tiers), timeline_(tiers.reads), choice_(choice), random_(seed) {
    layers_.assign(tiers.workloads, std::vector<Layer>(tiers.units));
    for (int64_t unit = 0; unit < tiers.units; ++unit) {
      memory_ += tiers.memory_nbytes[unit * tiers.tiers + choice[unit]];
      put(unit, choice[unit]);
    }
    now_ = best_s_ = seconds();
    best_ = choice_;
  }

  std::vector<int64_t> run(int64_t steps) {
    const double total = static_cast<double>(steps);
    while (steps > 0) {
      const double done = 1 - static_cast<double>(steps) / total;
      const double unit_s = best_s_ / static_cast<double>(tiers_.units);
      steps -= try_move(unit_s * kHot * std::pow(kCold / kHot, done));
    }
    return best_;
  }

 private:
  struct Move {
    int64_t unit, tier;
  };

  // Draws a move, and makes it if it is not much slower. Returns the steps that this took.
  int64_t try_move(double heat) {
    const int count = draw();
    int64_t memory = memory_;
    for (int i = 0; i < count; ++i) {
      const auto& [unit, tier] = moves_[i];
      const int64_t row = unit * tiers_.tiers;
      if (std::isinf(tiers_.compute_s[(row + tier) * tiers_.workloads])) return kLookedAt;
      memory += tiers_.memory_nbytes[row + tier] - tiers_.memory_nbytes[row + choice_[unit]];
    }
    if (memory > tiers_.budget_nbytes) return kLookedAt;
    for (int i = 0; i < count; ++i) exchange(&moves_[i]);
    const double after = seconds();
    if (after > now_ - heat * std::log(uniform())) {
      for (int i = count; i-- > 0;) exchange(&moves_[i]);
      return steps_;
    }
    now_ = after;
    memory_ = memory;
    if (now_ < best_s_) {
      best_s_ = now_;
      best_ = choice_;
    }
    return steps_;
  }

  // One unit, two, or two that exchange their tiers. Returns how many of `moves_`.
  int draw() {
    const int64_t kind = below(4);
    moves_[0] = {below(tiers_.units), below(tiers_.tiers)};
    if (kind == 0) return 1;
    moves_[1] = {below(tiers_.units), below(tiers_.tiers)};
    if (moves_[0].unit == moves_[1].unit) return 1;
    if (kind == 1) {
      moves_[0].tier = choice_[moves_[1].unit];
      moves_[1].tier = choice_[moves_[0].unit];
    }
    return 2;
  }

  // Makes a move, and turns it into the one that undoes it.
  void exchange(Move* move) {
    const int64_t before = choice_[move->unit];
    put(move->unit, move->tier);
    move->tier = before;
  }

  void put(int64_t unit, int64_t tier) {
    choice_[unit] = tier;
    const int64_t at = unit * tiers_.tiers + tier;
    for (int64_t w = 0; w < tiers_.workloads; ++w) {
      layers_[w][unit] = {tiers_.compute_s[at * tiers_.workloads + w], tiers_.read_nbytes[at]};
    }
  }

  double seconds() {
    steps_ = 0;
    for (const Layer& layer : layers_[0]) steps_ += timeline_.steps(layer.read_nbytes);
    steps_ *= tiers_.workloads;
    double sum = 0;
    for (int64_t w = 0; w < tiers_.workloads; ++w) {
      sum += tiers_.weights[w] * timeline_.pass_s(layers_[w]);
    }
    return sum;
  }

  int64_t below(int64_t count) {
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(count));
  }

  // Above 0, at most 1.
  double uniform() { return (static_cast<double>(random_() >> 11) + 1) * 0x1p-53; }

  const Tiers& tiers_;
  Timeline timeline_;
  std::vector<int64_t> choice_, best_;
  std::vector<std::vector<Layer>> layers_;
  std::mt19937_64 random_;
  Move moves_[2] = {};
  int64_t memory_ = 0, steps_ = 0;
  double now_ = 0, best_s_ = 0;
};

}  // namespace

std::vector<int64_t> anneal(const Tiers& tiers, const std::vector<int64_t>& choice, int64_t steps,
                            uint64_t seed) {
  return Search(tiers, choice, seed).run(steps);
}

}  // namespace dcext
