#pragma once

#include <cstdint>
#include <vector>

#include "policy/timeline.h"

namespace dcext {

/** Where each unit of a model can be, units in the order of a pass. Arrays are row-major and outlive it. */
struct Tiers {
  int64_t units, tiers, workloads;  ///< at least 1 of each
  const double* compute_s;          ///< (units, tiers, workloads); infinite: there is no such tier
  const int64_t* read_nbytes;       ///< (units, tiers), from the disk in a pass
  const int64_t* memory_nbytes;     ///< (units, tiers)
  const double* weights;            ///< (workloads,): how many passes there are of each
  int64_t budget_nbytes;            ///< of memory, for all units
  Reads reads;
};

/** anneal():
 *  Looks for tiers that take less time than those given, by simulated annealing (Kirkpatrick, Gelatt, Vecchi,
 *  Optimization by Simulated Annealing, Science 220, 1983) over moves of one unit, of two, and exchanges.
 *  @param choice   a tier of each unit, (units,), that exists and keeps the budget.
 *  @param steps    how much is tried, in reads and layers gone through, each of a nanosecond or few.
 *  @param seed     equal seeds give equal tiers.
 *  @return the best tiers that were seen: they keep the budget and take no more time than `choice`. */
std::vector<int64_t> anneal(const Tiers& tiers, const std::vector<int64_t>& choice, int64_t steps,
                            uint64_t seed);

}  // namespace dcext
