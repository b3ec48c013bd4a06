#include "base/checksum.h"

#if defined(__x86_64__)
#include <xxh_x86dispatch.h>  // renames XXH3_64bits to its dispatching form
#else
#define XXH_INLINE_ALL
#include <xxhash.h>
#endif

namespace dcext {

uint64_t checksum64(const void* data, size_t nbytes) { return XXH3_64bits(data, nbytes); }

}  // namespace dcext
