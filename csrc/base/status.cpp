#include "base/status.h"

namespace dcext {

const char* to_string(Status status) {
  switch (status) {
    case Status::kOk: return "ok";
    case Status::kBadArgument: return "bad argument";
    case Status::kTruncated: return "truncated";
    case Status::kBadMagic: return "bad magic";
    case Status::kBadVersion: return "unsupported version";
    case Status::kBadHeader: return "bad header";
    case Status::kBadChecksum: return "checksum mismatch";
    case Status::kCorrupt: return "corrupt data";
    case Status::kDstTooSmall: return "destination too small";
    case Status::kOutOfMemory: return "out of memory";
    case Status::kInternal: return "internal error";
    case Status::kReadError: return "read error";
    case Status::kFileChanged: return "file changed";
    case Status::kClosed: return "closed";
    case Status::kDeviceError: return "device error";
  }
  return "unknown status";
}

}  // namespace dcext
