#include "ops/build_info.h"

#include <torch/library.h>
#include <torch/version.h>

#include <sstream>

#include "kernels/cpu/dispatch.h"
#include "peer/version.h"

namespace peer {

std::string build_info() {
  std::ostringstream json;
  json << "{\"peer\": \"" << PEER_VERSION << "\", \"torch\": \"" << TORCH_VERSION
       << "\", \"compiler\": \"" << PEER_COMPILER << "\", \"cpu_capabilities\": \""
       << cpu::compiled_capabilities() << "\", \"cuda\": " << PEER_CUDA_INFO << "}";
  return json.str();
}

std::string cpu_capability() { return cpu::name_of(cpu::chosen_capability()); }

}  // namespace peer

TORCH_LIBRARY_FRAGMENT(peer, m) {
  m.def("build_info() -> str", &peer::build_info);
  m.def("cpu_capability() -> str", &peer::cpu_capability);
}
