// The operators as functions, and their checks.
#include <peer/functional.h>
#include <peer/version.h>
#include <torch/types.h>

#include <string>

#include "../kernels/catch.hpp"

namespace {

const torch::Tensor keys = torch::tensor({0.0F, 2.0F}).view({2, 1});
// An expert is a row: [down, up].
const torch::Tensor table =
    torch::tensor({1.0F, 0.0F, 1.0F, 2.0F, 0.0F, 1.0F, 0.0F, 5.0F}).view({2, 2, 2});
const torch::Tensor one_token = torch::tensor({{2.0F, 3.0F}});
const torch::Tensor half_and_one = torch::tensor({{0.5F, 1.0F}});

}  // namespace

TEST_CASE("product_key_topk takes the best pairs of keys") {
  const auto [scores, indices] = peer::product_key_topk(
      torch::ones({1, 1, 2}), keys, torch::tensor({0.0F, 1.0F, 3.0F}).view({3, 1}), 3);
  CHECK(scores.flatten().equal(torch::tensor({5.0F, 3.0F, 3.0F})));
  CHECK(indices.flatten().equal(torch::tensor({5, 4, 2}, torch::kLong)));
}

TEST_CASE("expert_mlp sums the weighted experts, with a gradient") {
  const torch::Tensor x = one_token.clone().requires_grad_();
  const torch::Tensor ids = torch::tensor({0, 1}, torch::kLong).view({1, 2});
  const torch::Tensor y = peer::expert_mlp(x, half_and_one, ids, table, "relu");
  CHECK(y.equal(torch::tensor({{1.0F, 17.0F}})));
  y.sum().backward();
  CHECK(x.grad().equal(torch::tensor({{1.5F, 5.0F}})));
}

TEST_CASE("frozen experts have no gradient") {
  const torch::Tensor ids = torch::tensor({0, 1}, torch::kLong).view({1, 2});
  const torch::Tensor frozen = torch::tensor({true, false});
  for (const bool sparse_grad : {false, true}) {
    const torch::Tensor x = one_token.clone().requires_grad_();
    const torch::Tensor leaf = table.clone().requires_grad_();
    const torch::Tensor y =
        peer::expert_mlp(x, half_and_one, ids, leaf, "relu", sparse_grad, frozen);
    CHECK(y.equal(torch::tensor({{1.0F, 17.0F}})));
    y.sum().backward();
    CHECK(x.grad().equal(torch::tensor({{1.5F, 5.0F}})));
    CHECK(leaf.grad().to_dense().flatten().equal(
        torch::tensor({0.0F, 0.0F, 0.0F, 0.0F, 10.0F, 15.0F, 3.0F, 3.0F})));
    CHECK((!sparse_grad || leaf.grad()._nnz() == 1));
  }
  // A module holds an undefined tensor while nothing is frozen.
  CHECK(peer::expert_mlp(one_token, half_and_one, ids, table, "relu", false, torch::Tensor())
            .equal(torch::tensor({{1.0F, 17.0F}})));
  CHECK_THROWS_AS(peer::expert_mlp(one_token, half_and_one, ids, table, "relu", false, ids),
                  c10::ValueError);
  CHECK_THROWS_AS(
      peer::expert_mlp(one_token, half_and_one, ids, table, "relu", false, frozen.to(torch::kInt)),
      c10::TypeError);
}

TEST_CASE("experts of three parts have gates") {
  const torch::Tensor gated =
      torch::stack({table.select(1, 0), table.select(1, 1) + 1.0F, table.select(1, 1)}, 1);
  const torch::Tensor ids = torch::tensor({0, 1}, torch::kLong).view({1, 2});
  const torch::Tensor y = peer::expert_mlp(one_token, half_and_one, ids, gated, "relu");
  CHECK(y.equal(torch::tensor({{13.0F, 326.0F}})));
}

TEST_CASE("router_weights of equal scores are equal") {
  CHECK(peer::router_weights(torch::ones({2})).equal(torch::full({2}, 0.5F)));
  CHECK(peer::router_weights(torch::tensor({-1.0F, 2.0F}), "relu")
            .equal(torch::tensor({0.0F, 2.0F})));
  CHECK_THROWS_AS(peer::router_weights(torch::ones({2}), "max"), c10::ValueError);
}

TEST_CASE("an id that is not an expert's is an error that names it") {
  for (const int64_t id : {int64_t{-1}, int64_t{2}, INT64_MAX, INT64_MIN}) {
    const torch::Tensor ids = torch::full({1, 2}, id, torch::kLong);
    CHECK_THROWS_AS(peer::expert_mlp(one_token, half_and_one, ids, table), c10::IndexError);
    CHECK_THROWS_WITH(peer::expert_mlp(one_token, half_and_one, ids, table),
                      Catch::Contains(std::to_string(id)));
  }
}

TEST_CASE("shapes, dtypes and names are checked as in Python") {
  const torch::Tensor ids = torch::zeros({1, 2}, torch::kLong);
  for (const auto& other : {table.select(1, 0), table.slice(1, 0, 1), table.slice(2, 0, 1)}) {
    CHECK_THROWS_AS(peer::expert_mlp(one_token, half_and_one, ids, other), c10::ValueError);
  }
  CHECK_THROWS_AS(peer::expert_mlp(one_token, half_and_one, ids.to(torch::kInt), table),
                  c10::TypeError);
  CHECK_THROWS_AS(peer::expert_mlp(one_token, half_and_one, ids, table, "swish"), c10::ValueError);
  CHECK_THROWS_AS(peer::product_key_topk(torch::ones({1, 1, 2}), keys, keys, 5), c10::ValueError);
}

TEST_CASE("tables in large pages are ordinary tensors") {
  const torch::Tensor zeros = peer::zeros_huge({2048, 512});
  CHECK(zeros.sizes() == torch::IntArrayRef{2048, 512});
  CHECK(zeros.count_nonzero().item<int64_t>() == 0);
  CHECK(peer::empty_huge({3, 2}, torch::kBFloat16).scalar_type() == torch::kBFloat16);
}

TEST_CASE("the headers know their version") {
  CHECK(std::string(PEER_VERSION) == std::to_string(PEER_VERSION_MAJOR) + "." +
                                         std::to_string(PEER_VERSION_MINOR) + "." +
                                         std::to_string(PEER_VERSION_PATCH));
}
