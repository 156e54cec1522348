// Calls the operators as functions, without modules.
//
//   operators
#include <peer/functional.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <iostream>

int main() {
  constexpr int64_t kTokens = 5, kDim = 16, kHeads = 2, kRows = 4, kColumns = 6, kKeyDim = 8,
                    kPerHead = 3;
  torch::manual_seed(0);

  const torch::Tensor query = torch::randn({kTokens, kHeads, kKeyDim}).requires_grad_();
  const torch::Tensor row_keys = torch::randn({kRows, kKeyDim / 2});
  const torch::Tensor col_keys = torch::randn({kColumns, kKeyDim / 2});
  const auto [scores, indices] = peer::product_key_topk(query, row_keys, col_keys, kPerHead);
  const torch::Tensor weights = peer::router_weights(scores, "softmax");

  const torch::Tensor x = torch::randn({kTokens, kDim});
  const torch::Tensor table = torch::randn({kRows * kColumns, 2, kDim}).requires_grad_();
  const torch::Tensor y = peer::expert_mlp(x, weights.flatten(1), indices.flatten(1), table);
  y.square().mean().backward();

  std::cout << "experts of the first token\n" << indices[0] << "\n";
  std::cout << "output " << y.sizes() << ", gradients " << query.grad().norm().item<float>() << " "
            << table.grad().norm().item<float>() << "\n";
}
