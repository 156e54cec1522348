#pragma once

#include <string>

namespace peer {

// How the library was built, as JSON.
std::string build_info();

// The capability whose CPU kernels run: "default", "avx2" or "avx512".
std::string cpu_capability();

}  // namespace peer
