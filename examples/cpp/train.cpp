// Trains a residual block with a PEER layer to imitate a fixed random network, and saves its state.
// Python loads the state under the same names.
//
//   train STATE.pt [STEPS]
#include <peer/peer.h>
#include <torch/nn/modules/normalization.h>
#include <torch/optim/adamw.h>

#include <cstdlib>
#include <iostream>

constexpr int64_t kDim = 32;

struct BlockImpl : torch::nn::Module {
  BlockImpl()
      : norm(torch::nn::LayerNormOptions({kDim})),
        peer(peer::nn::PEEROptions(kDim)
                 .num_experts(64 * 64)
                 .heads(4)
                 .num_experts_per_head(8)
                 .dim_key(32)
                 .dropout(0.1)) {
    register_module("norm", norm);
    register_module("peer", peer);
  }

  torch::Tensor forward(const torch::Tensor& x) { return x + peer(norm(x)); }

  torch::nn::LayerNorm norm;
  peer::nn::PEER peer;
};
TORCH_MODULE(Block);

int main(int count, char** arguments) {
  if (count < 2) {
    std::cerr << "usage: train STATE.pt [STEPS]\n";
    return 2;
  }
  const int steps = count > 2 ? std::atoi(arguments[2]) : 300;

  torch::manual_seed(0);
  Block block;
  std::cout << block << "\n";
  const torch::Tensor inner = torch::randn({kDim, 64}) / 4;
  const torch::Tensor outer = torch::randn({64, kDim}) / 4;

  torch::optim::AdamW optimizer(block->parameters(), torch::optim::AdamWOptions(3e-3));
  for (int step = 0; step <= steps; ++step) {
    const torch::Tensor x = torch::randn({256, kDim});
    const torch::Tensor loss = torch::mse_loss(block(x), x + torch::tanh(x.mm(inner)).mm(outer));
    if (step % 50 == 0) {
      std::cout << "step " << step << ", loss " << loss.item<float>() << "\n";
    }
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
  }

  peer::save_state_dict(*block, arguments[1]);
  std::cout << "saved " << arguments[1] << "\n";
}
