#include "runtime/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include "base/bytes.h"

namespace dcext {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t mapped_nbytes(int64_t nbytes) { return align_up(nbytes, sysconf(_SC_PAGESIZE)); }

}  // namespace

uint8_t* allocate_weights(int64_t nbytes) {
  const int64_t size = mapped_nbytes(nbytes);
  const int64_t slack = size < kHugePage ? 0 : kHugePage;
  void* mapping =
      mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  uint8_t* data = static_cast<uint8_t*>(mapping);
  if (slack == 0) return data;
  // Keep the 2 MiB-aligned part, give the rest of the address space back.
  uint8_t* aligned = reinterpret_cast<uint8_t*>(
      align_up(reinterpret_cast<uint64_t>(data), static_cast<uint64_t>(kHugePage)));
  const int64_t before = aligned - data;
  if (before != 0) munmap(data, before);
  if (before != slack) munmap(aligned + size, slack - before);
  madvise(aligned, size / kHugePage * kHugePage,
          MADV_HUGEPAGE);  // advice: refusal costs speed only
  return aligned;
}

void free_weights(uint8_t* data, int64_t nbytes) { munmap(data, mapped_nbytes(nbytes)); }

}  // namespace dcext
