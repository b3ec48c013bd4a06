#include "base/cpu_features.h"

#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dcext {
namespace {

constexpr const char* kNames[kNumIsas] = {"scalar", "avx2", "avxvnni", "avx512vnni", "amx"};

#if defined(__x86_64__) && defined(__linux__)

bool cpu_has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 4)) != 0;
}

bool cpu_has_amx_int8() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
         (edx & (kTile | kInt8)) == (kTile | kInt8);
}

// Linux hands out the 8 KiB tile state on request only (arch_prctl(2), since 5.16).
bool kernel_grants_tile_data() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

std::vector<bool> detect() {
  std::vector<bool> has(kNumIsas, false);
  has[0] = true;
  __builtin_cpu_init();
  has[1] = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2");
  has[2] = has[1] && cpu_has_avx_vnni();
  has[3] = has[1] && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
  has[4] = has[3] && cpu_has_amx_int8() && kernel_grants_tile_data();
  return has;
}

#else

std::vector<bool> detect() {
  std::vector<bool> has(kNumIsas, false);
  has[0] = true;
  return has;
}

#endif

const std::vector<bool>& features() {
  static const std::vector<bool> kFeatures = detect();
  return kFeatures;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_supported(Isa isa) { return features()[static_cast<int>(isa)]; }

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (int i = 0; i < kNumIsas; ++i) {
    if (isa_supported(static_cast<Isa>(i))) isas.push_back(static_cast<Isa>(i));
  }
  return isas;
}

bool parse_isa(const char* name, Isa* isa) {
  for (int i = 0; i < kNumIsas; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

}  // namespace dcext
