// Which capability's kernels run. Compiled once, for the baseline.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "kernels/cpu/kernels.h"

#if defined(__x86_64__)
#define PEER_HAS_X86_CAPABILITIES 1
#else
#define PEER_HAS_X86_CAPABILITIES 0
#endif

namespace peer::cpu {

namespace baseline {
extern const Kernels kernels;
}
#if PEER_HAS_X86_CAPABILITIES
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

bool always() { return true; }

#if PEER_HAS_X86_CAPABILITIES
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Capability {
  const char* name;
  const Kernels& kernels;
  bool (*runs_here)();
};

// Best last.
const Capability kCapabilities[] = {
    {"default", baseline::kernels, always},
#if PEER_HAS_X86_CAPABILITIES
    {"avx2", avx2::kernels, has_avx2},
    {"avx512", avx512::kernels, has_avx512},
#endif
};

const Capability& choose() {
  if (const char* name = std::getenv("PEER_CPU_CAPABILITY"); name != nullptr && *name != '\0') {
    for (const Capability& capability : kCapabilities) {
      if (std::string_view(capability.name) == name) {
        if (!capability.runs_here()) {
          throw std::runtime_error("peer: PEER_CPU_CAPABILITY=" + std::string(name) +
                                   ", but this processor does not have " + name);
        }
        return capability;
      }
    }
    throw std::runtime_error("peer: PEER_CPU_CAPABILITY=" + std::string(name) +
                             " is not one of: " + compiled_capabilities());
  }
  const Capability* best = nullptr;
  for (const Capability& capability : kCapabilities) {
    if (capability.runs_here()) {
      best = &capability;
    }
  }
  return *best;
}

const Capability& chosen() {
  static const Capability& capability = choose();
  return capability;
}

}  // namespace

const Kernels& kernels() { return chosen().kernels; }

const char* capability() { return chosen().name; }

const Kernels* kernels_for(const char* name) {
  for (const Capability& capability : kCapabilities) {
    if (std::string_view(capability.name) == name && capability.runs_here()) {
      return &capability.kernels;
    }
  }
  return nullptr;
}

const char* compiled_capabilities() {
  static const std::string names = [] {
    std::string joined;
    for (const Capability& capability : kCapabilities) {
      joined += joined.empty() ? "" : " ";
      joined += capability.name;
    }
    return joined;
  }();
  return names.c_str();
}

}  // namespace peer::cpu
