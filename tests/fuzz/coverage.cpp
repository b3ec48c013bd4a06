#include "coverage.h"

#include <cstring>

extern "C" char
    __executable_start;  // the linker's; addresses relative to it are the same in each run

namespace dcext::fuzz {
namespace {

constexpr uint32_t kNumEdges = 1 << 16;
bool active = false;
uint32_t previous = 0;
uint8_t run_edges[kNumEdges], all_edges[kNumEdges];

uint32_t mix(uint64_t value) {
  return static_cast<uint32_t>((value * 0x9e3779b97f4a7c15u) >> 40) % kNumEdges;
}

// Once, a few times, or many: each of them a bit, as what loops do the first time and later differs.
uint8_t how_often(uint8_t count) { return count == 0 ? 0 : count == 1 ? 1 : count < 16 ? 2 : 4; }

}  // namespace

void begin_coverage() {
  std::memset(run_edges, 0, sizeof(run_edges));
  previous = 0;
  active = true;
}

void cover_result(uint32_t result) { run_edges[mix(0x10000000u + result)] = 1; }

int end_coverage() {
  active = false;
  int found = 0;
  for (uint32_t i = 0; i < kNumEdges; i += 8) {
    uint64_t word;
    std::memcpy(&word, run_edges + i, sizeof(word));
    if (word == 0) continue;
    for (uint32_t j = i; j < i + 8; ++j) {
      const uint8_t often = how_often(run_edges[j]);
      found += (often & ~all_edges[j]) != 0;
      all_edges[j] |= often;
    }
  }
  return found;
}

int covered_edges() {
  int count = 0;
  for (const uint8_t edge : all_edges) count += edge != 0;
  return count;
}

}  // namespace dcext::fuzz

extern "C" void __sanitizer_cov_trace_pc() {
  using namespace dcext::fuzz;
  if (!active) return;
  const auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0)) -
                  reinterpret_cast<uintptr_t>(&__executable_start);
  const uint32_t place = mix(pc);
  uint8_t& count = run_edges[place ^ previous];
  if (count < 255) ++count;
  previous = place >> 1;
}
