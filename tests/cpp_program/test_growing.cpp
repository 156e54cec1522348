// Layers that grow, freeze and disable experts: what stays, what learns, and what is saved.
#include <peer/peer.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "../kernels/catch.hpp"

namespace {

using peer::nn::PEER;
using peer::nn::PEEROptions;
using torch::Tensor;

PEEROptions small() {
  return PEEROptions(8).num_experts({4, 6}).heads(2).num_experts_per_head(3).dim_key(4);
}

std::string temporary_file() {
  char name[] = "/tmp/peer-growing-XXXXXX";
  close(mkstemp(name));
  return name;
}

Tensor ids(std::initializer_list<int64_t> values) {
  return torch::tensor(std::vector<int64_t>(values));
}

void train(PEER& layer) {
  torch::optim::AdamW optimizer(layer->parameters(), torch::optim::AdamWOptions(0.1));
  for (int step = 0; step < 2; ++step) {
    optimizer.zero_grad();
    layer(torch::randn({16, 8})).square().sum().backward();
    optimizer.step();
  }
}

}  // namespace

TEST_CASE("growth keeps old experts and old outputs") {
  PEER layer(small().share_keys(false));
  layer->eval();
  const torch::NoGradGuard no_grad;
  const Tensor table = layer->experts->weight.clone(), keys = layer->router->row_keys.clone();
  const Tensor* const parameter = &layer->experts->weight;
  const Tensor x = torch::randn({5, 8}), y = layer(x);
  layer->grow(2, torch::full({2, 2, 2}, -1e4));  // keys that no query finds
  CHECK(layer->num_experts() == 36);
  CHECK(layer->router->row_keys.sizes() == torch::IntArrayRef{2, 6, 2});
  CHECK(layer->experts->weight.narrow(0, 0, 24).equal(table));
  CHECK(layer->router->row_keys.narrow(1, 0, 4).equal(keys));
  CHECK(layer->experts->w_up().narrow(0, 24, 12).count_nonzero().item<int64_t>() == 0);
  CHECK(layer->experts->w_down().narrow(0, 24, 12).count_nonzero().item<int64_t>() == 96);
  CHECK(layer->experts->named_parameters()["weight"].is_same(*parameter));
  const auto [weights, indices] = layer->router(x);
  if ((indices < 24).all().item<bool>()) {
    CHECK(layer(x).equal(y));
  }
}

TEST_CASE("growth is refused while a gradient or a graph has the old shape") {
  PEER layer(small());
  Tensor loss = layer(torch::randn({5, 8})).sum();
  CHECK_THROWS_WITH(layer->grow(1), Catch::Contains("a graph of autograd holds it"));
  loss.backward();
  loss = Tensor();
  CHECK_THROWS_WITH(layer->grow(1), Catch::Contains("its gradient has the old shape"));
  CHECK_THROWS_WITH(layer->grow(0), Catch::Contains("expected rows to be positive"));
  CHECK(layer->num_experts() == 24);
  CHECK(layer->router->row_keys.size(0) == 4);
  layer->zero_grad();
  layer->grow(1);
  CHECK(layer->num_experts() == 30);
}

TEST_CASE("a layer grows a pool only where its grid does not fit") {
  PEER first(small());
  PEER second(peer::nn::ProductKeyRouter(small().num_experts({2, 6}).router()), first->experts);
  second->grow(2);
  CHECK(first->experts->weight.size(0) == 24);
  second->grow(1);
  CHECK(first->experts->weight.size(0) == 30);
  CHECK(first->num_experts() == 24);
  first(torch::randn({5, 8}));
  CHECK_THROWS_WITH(
      PEER(peer::nn::ProductKeyRouter(small().num_experts({9, 9}).router()), first->experts),
      Catch::Contains("expected a pool of at least"));
}

TEST_CASE("frozen experts and keys hold, others learn") {
  const bool key_norm = GENERATE(false, true);
  PEER layer(small().key_norm(key_norm));
  train(layer);
  layer->freeze_experts(ids({0, 7}));  // experts (0, 0) and (1, 1)
  const Tensor table = layer->experts->weight.detach().clone();
  const auto [rows, columns] = layer->router->effective_keys();
  const Tensor kept_rows = rows.detach().clone(), kept_columns = columns.detach().clone();
  layer(torch::randn({16, 8})).square().sum().backward();
  const Tensor gradient = layer->experts->weight.grad();
  CHECK(gradient.index_select(0, ids({0, 7})).count_nonzero().item<int64_t>() == 0);
  CHECK(gradient.count_nonzero().item<int64_t>() > 0);
  train(layer);
  const auto [new_rows, new_columns] = layer->router->effective_keys();
  CHECK((new_rows == kept_rows).all(1).equal(torch::tensor({true, true, false, false})));
  CHECK((new_columns == kept_columns)
            .all(1)
            .equal(torch::tensor({true, true, false, false, false, false})));
  layer->unfreeze_experts(ids({7}));
  CHECK(layer->router->frozen_rows.equal(torch::tensor({true, false, false, false})));
  CHECK(layer->router->row_keys[1].equal(kept_rows[1]));
}

TEST_CASE("new keys are noisy copies of the keys in effect") {
  PEER layer(small());
  layer->router->freeze_keys();
  torch::NoGradGuard no_grad;
  layer->router->row_keys.mul_(1e6);  // what an optimizer does has no effect
  CHECK(layer->router->make_row_keys(9).abs().max().item<double>() < 1e3);
}

TEST_CASE("a mask that a program gives stays the program's") {
  PEER layer(small());
  const Tensor rows = torch::tensor({true, false, false, false});
  layer->router->freeze_keys(rows);
  layer->router->freeze_keys(rows.logical_not());
  CHECK(rows.equal(torch::tensor({true, false, false, false})));
  layer->router->unfreeze_keys();
  CHECK(rows.equal(torch::tensor({true, false, false, false})));
}

TEST_CASE("a frozen layer does not learn, and a new row does") {
  PEER layer(small());
  train(layer);
  layer->freeze_experts();
  const Tensor x = torch::randn({16, 8}), mean = layer->router->norm->running_mean;
  const Tensor mean_before = mean.clone();
  layer(x).square().sum().backward();
  CHECK_FALSE(layer->router->query->weight.requires_grad());
  CHECK(mean.equal(mean_before));
  CHECK(layer->experts->weight.grad().count_nonzero().item<int64_t>() == 0);
  layer->zero_grad();
  layer->grow(2);
  CHECK(layer->experts->frozen.sum().item<int64_t>() == 24);
  CHECK(layer->router->frozen_rows.equal(torch::tensor({true, true, true, true, false, false})));
  layer(x).square().sum().backward();
  CHECK(layer->experts->weight.grad().narrow(0, 0, 24).count_nonzero().item<int64_t>() == 0);
  layer->unfreeze_experts();
  CHECK(layer->router->query->weight.requires_grad());
}

TEST_CASE("disabled experts are not retrieved, and enough stay enabled") {
  PEER layer(small());
  layer->disable_experts(torch::arange(20));
  const auto [weights, indices] =
      layer->router->forward(torch::randn({9, 8}), {}, layer->experts->disabled);
  CHECK(indices.min().item<int64_t>() >= 20);
  CHECK_THROWS_WITH(
      layer->disable_experts(ids({20, 21})),
      Catch::Contains("at least num_experts_per_head=3 enabled experts, but 2 of 24"));
  layer(torch::randn({9, 8})).sum().backward();
  layer->enable_experts();
  CHECK(layer->experts->disabled.numel() == 0);
}

TEST_CASE("experts are ids or a mask") {
  PEER layer(small());
  CHECK_THROWS_AS(layer->freeze_experts(ids({24})), c10::IndexError);
  CHECK_THROWS_AS(layer->freeze_experts(ids({-1})), c10::IndexError);
  CHECK_THROWS_AS(layer->freeze_experts(torch::ones({23}, torch::kBool)), c10::ValueError);
  CHECK_THROWS_AS(layer->freeze_experts(torch::ones({24})), c10::TypeError);
  CHECK_FALSE(layer->experts->frozen.defined());
  layer->freeze_experts(torch::arange(24) % 2 == 0);
  CHECK(layer->experts->frozen.sum().item<int64_t>() == 12);
}

TEST_CASE("a copy of a grown and frozen layer is equal and independent") {
  PEER layer(small());
  layer->grow(2);
  layer->freeze_experts(ids({3}), /*keys=*/true, /*router=*/true);
  layer->disable_experts(ids({5}));
  const auto copy = std::dynamic_pointer_cast<peer::nn::PEERImpl>(layer->clone());
  const Tensor x = torch::randn({5, 8});
  CHECK(copy->forward(x).equal(layer(x)));
  CHECK(copy->num_experts() == 36);
  CHECK_FALSE(copy->router->query->weight.requires_grad());
  CHECK(copy->router->norm->are_statistics_frozen);
  layer->unfreeze_experts();
  layer->enable_experts();
  CHECK(copy->experts->frozen.sum().item<int64_t>() == 1);
  CHECK(copy->experts->disabled.sum().item<int64_t>() == 1);
  CHECK(copy->router->frozen_rows.sum().item<int64_t>() == 1);
}

TEST_CASE("a module gets the sizes and masks of a file") {
  const std::string path = temporary_file(), plain = temporary_file();
  PEER layer(small()), other(small());
  peer::save_state_dict(*layer, plain);
  layer->grow(2);
  layer->freeze_experts(ids({3}), /*keys=*/true, /*router=*/true);
  layer->disable_experts(ids({5}));
  peer::save_state_dict(*layer, path);
  CHECK_THROWS_WITH(peer::load_state_dict(*other, path),
                    Catch::Contains("experts.frozen does not belong to the module"));
  peer::grow_to(*other, path);
  peer::load_state_dict(*other, path);
  const Tensor x = torch::randn({5, 8});
  CHECK(other(x).equal(layer(x)));
  CHECK(other->experts->frozen.equal(layer->experts->frozen));
  CHECK_FALSE(other->router->query->weight.requires_grad());
  CHECK_THROWS_WITH(peer::grow_to(*other, plain), Catch::Contains("or one with more rows"));

  layer->unfreeze_experts();
  layer->enable_experts();
  peer::save_state_dict(*layer, path);  // has no masks
  peer::grow_to(*other, path);
  peer::load_state_dict(*other, path);
  CHECK(other->router->query->weight.requires_grad());
  CHECK(other(x).equal(layer(x)));
  std::filesystem::remove(path);
  std::filesystem::remove(plain);
}
