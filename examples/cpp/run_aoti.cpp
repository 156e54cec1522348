// Loads an AOTInductor package of a module with PEER layers, and runs it on different numbers of
// tokens.
//
//   run_aoti PACKAGE.pt2 DIM
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/types.h>

#include <cstdlib>
#include <iostream>

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: run_aoti PACKAGE.pt2 DIM\n";
    return 2;
  }
  const torch::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const int64_t dim = std::atoll(arguments[2]);

  std::cout.precision(9);
  for (const int64_t tokens : {2, 8, 100}) {
    const torch::Tensor x = torch::linspace(-1, 1, tokens * dim).view({tokens, dim});
    const torch::Tensor y = model.run({x}).at(0);
    std::cout << tokens << " tokens " << y.sizes() << " " << y.norm().item<float>() << "\n";
  }
}
