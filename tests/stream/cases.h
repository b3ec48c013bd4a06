#pragma once

#include <string>

namespace dcext::stress {

// Each returns 0, or ends the process as the stress does.

/** Uses that wait while others have begun and do nothing, end, or close the stream. */
int run_cases();

/** The CPU time of streams where nothing moves: prefetched, waiting for a slot, waiting for a read. */
int run_idle();

/** Files that are missing, cut short, written to, or end in the middle of a page. */
int run_files(const std::string& folder);

}  // namespace dcext::stress
