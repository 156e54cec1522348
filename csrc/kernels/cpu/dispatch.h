// Which capability's kernels run, decided at run time.
//
//   kernels<ExpertMlpKernels>().of<float>().forward(pass, first, last)
//
// Every kernel takes a range of independent work items, so the caller decides how many threads
// share them. No result depends on how the ranges are cut.
#pragma once

namespace peer::cpu {

// The instruction sets that the kernels are compiled for, the best last.
enum class Capability { baseline, avx2, avx512 };

// "default", "avx2" or "avx512".
const char* name_of(Capability capability);

// Whether its kernels were compiled and this processor can run them.
bool is_available(Capability capability);

// The best available capability, or the one that the environment variable PEER_CPU_CAPABILITY
// names. Read once; throws std::runtime_error if the name is unknown or the processor lacks the
// capability.
Capability chosen_capability();

// The names of the capabilities that were compiled, separated by spaces.
const char* compiled_capabilities();

// An operator's kernels.
template <class Kernels>
const Kernels& kernels(Capability capability = chosen_capability()) {
#if defined(__x86_64__)
  switch (capability) {
    case Capability::avx512:
      return Kernels::avx512;
    case Capability::avx2:
      return Kernels::avx2;
    case Capability::baseline:
      break;
  }
#endif
  return Kernels::baseline;
}

}  // namespace peer::cpu
