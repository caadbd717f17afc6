#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fm {
namespace {

const InstructionSet& choose() {
  const char* wanted = std::getenv("FASTMETA_CPU_ISA");
  const std::string name = wanted ? wanted : "";
#ifdef FASTMETA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx512 && (name.empty() || name == "avx512")) return isa_avx512;
  if (avx2 && (name.empty() || name == "avx2")) return isa_avx2;
#endif
  if (name.empty() || name == "base") return isa_base;
  throw std::runtime_error(
      "FASTMETA_CPU_ISA: expected one of base, avx2, avx512 that this processor has, got " + name);
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace fm
