#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "runtime/direct_file.h"

namespace dcext::stress {

/** Writes `nbytes` bytes, each of which follows from its offset, to a new file without a name, removed at the latest
 *  when the process ends.
 *  @param folder   where; a file system with or without O_DIRECT. */
std::unique_ptr<DirectFile> open_pattern_file(const std::string& folder, int64_t nbytes,
                                              PageCache cache);

/** Writes the pattern to a file, which stays. */
void write_pattern(const std::string& path, int64_t nbytes);

/** Whether [data, data + nbytes) is what the pattern has at `offset`. */
bool matches_pattern(const uint8_t* data, int64_t offset, int64_t nbytes);

}  // namespace dcext::stress
