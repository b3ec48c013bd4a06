#pragma once

#include <cstdint>

namespace dcext::fuzz {

// Which ways through the instrumented sources a run took: gcc calls us at every branch target (-fsanitize-coverage).

/** Forgets the ways of the run before and counts from here. */
void begin_coverage();
/** Notes a result as if it were a branch. */
void cover_result(uint32_t result);
/** Stops counting. @return how many ways are new to all runs so far, or taken as often for the first time. */
int end_coverage();
int covered_edges();

}  // namespace dcext::fuzz
