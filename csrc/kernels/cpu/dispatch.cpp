#include "kernels/cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace peer::cpu {

namespace {

#if defined(__x86_64__)
constexpr Capability kCompiled[] = {Capability::baseline, Capability::avx2, Capability::avx512};

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
constexpr Capability kCompiled[] = {Capability::baseline};

bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

Capability choose() {
  if (const char* name = std::getenv("PEER_CPU_CAPABILITY"); name != nullptr && *name != '\0') {
    for (const Capability capability : kCompiled) {
      if (std::string_view(name_of(capability)) == name) {
        if (!is_available(capability)) {
          throw std::runtime_error("peer: PEER_CPU_CAPABILITY=" + std::string(name) +
                                   ", but this processor does not have " + name);
        }
        return capability;
      }
    }
    throw std::runtime_error("peer: PEER_CPU_CAPABILITY=" + std::string(name) +
                             " is not one of: " + compiled_capabilities());
  }
  Capability best = Capability::baseline;
  for (const Capability capability : kCompiled) {
    if (is_available(capability)) {
      best = capability;
    }
  }
  return best;
}

}  // namespace

const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    case Capability::baseline:
      break;
  }
  return "default";
}

bool is_available(Capability capability) {
  switch (capability) {
    case Capability::avx512:
      return has_avx512();
    case Capability::avx2:
      return has_avx2();
    case Capability::baseline:
      break;
  }
  return true;
}

Capability chosen_capability() {
  static const Capability capability = choose();
  return capability;
}

const char* compiled_capabilities() {
  static const std::string names = [] {
    std::string joined;
    for (const Capability capability : kCompiled) {
      joined += joined.empty() ? "" : " ";
      joined += name_of(capability);
    }
    return joined;
  }();
  return names.c_str();
}

}  // namespace peer::cpu
