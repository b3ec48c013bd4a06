#pragma once

#include <cstdint>

namespace dcext {

/** Outcome of every torch-free function that can fail. The values are pinned: they appear in messages and tests. */
enum class Status : int32_t {
  kOk = 0,
  kBadArgument = 1,  ///< the caller broke the contract of the function
  kTruncated = 2,    ///< fewer bytes than the header or the chunk table calls for
  kBadMagic = 3,     ///< the first bytes are not a payload's
  kBadVersion = 4,   ///< a payload of a version that this build does not read
  kBadHeader = 5,  ///< a field of the header or of the chunk table is out of range or inconsistent
  kBadChecksum = 6,  ///< stored bytes differ from the ones that were written
  kCorrupt = 7,  ///< checksums hold, yet the coded data do not decode to what the table promises
  kDstTooSmall = 8,   ///< destination capacity is below what the call writes
  kOutOfMemory = 9,   ///< an allocation of the size named by a valid header failed
  kInternal = 10,     ///< libzstd refused what it should have accepted
  kReadError = 11,    ///< the system could not read a file
  kFileChanged = 12,  ///< a file is not the one that was opened: it was written to, or cut short
  kClosed = 13,       ///< a stream was closed while, or before, it was used
  kDeviceError = 14,  ///< a device, or its driver, refused a call
};

/** A short English phrase without a full stop, for error messages. Never null. */
const char* to_string(Status status);

}  // namespace dcext
