#pragma once

#include <vector>

namespace dcext {

/** Instruction sets that some kernel is written for, in increasing order of preference. */
enum class Isa : int {
  kScalar = 0,
  kAvx2 = 1,        ///< AVX2 + FMA + BMI2
  kAvxVnni = 2,     ///< AVX2 + AVX-VNNI
  kAvx512Vnni = 3,  ///< AVX-512 F/BW/DQ/VL + VNNI
  kAmx = 4,         ///< kAvx512Vnni + AMX-TILE/INT8, and the kernel grants tile data
};
constexpr int kNumIsas = 5;

/** The name that DCEXT_CPU accepts: "scalar", "avx2", "avxvnni", "avx512vnni", "amx". */
const char* isa_name(Isa isa);

/** Whether this CPU and operating system run `isa`. Detected once, thread-safe. */
bool isa_supported(Isa isa);

/** All supported sets, worst first. Always contains kScalar. */
std::vector<Isa> supported_isas();

/** Parses a name. Returns false, leaving `isa` alone, when the name is unknown. */
bool parse_isa(const char* name, Isa* isa);

}  // namespace dcext
