// Loads a TorchScript module with PEER layers, and runs it forward and backward.
//
//   run_torchscript MODULE.pt DIM
//
// The program uses no header of peer: linking the library registers its operators, and the module
// contains everything else.
#include <torch/script.h>

#include <cstdlib>
#include <iostream>

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: run_torchscript MODULE.pt DIM\n";
    return 2;
  }
  torch::jit::Module module = torch::jit::load(arguments[1]);
  const int64_t dim = std::atoll(arguments[2]);

  const torch::Tensor x = torch::linspace(-1, 1, 8 * dim).view({8, dim}).requires_grad_();
  const torch::Tensor y = module.forward({x}).toTensor();
  y.square().sum().backward();

  std::cout.precision(9);
  std::cout << "output " << y.sizes() << " " << y.norm().item<float>() << "\n";
  std::cout << "grad x " << x.grad().norm().item<float>() << "\n";
  for (const auto& parameter : module.named_parameters()) {
    std::cout << "grad " << parameter.name << " " << parameter.value.grad().norm().item<float>()
              << "\n";
  }
}
