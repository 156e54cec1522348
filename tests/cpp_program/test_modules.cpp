// The modules as LibTorch's own are used: options, copies, containers, printing, and what is
// refused.
#include <peer/nn.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cmath>
#include <limits>
#include <sstream>

#include "../kernels/catch.hpp"

namespace {

using peer::nn::Grid;
using peer::nn::PEER;
using peer::nn::PEEROptions;

PEEROptions small(int64_t dim = 8) {
  return PEEROptions(dim).num_experts({4, 6}).heads(2).num_experts_per_head(3).dim_key(4);
}

template <typename Options>
std::string refusal(const Options& options) {
  try {
    PEER layer(options);
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return "not refused";
}

}  // namespace

TEST_CASE("the defaults are the paper's layer") {
  const PEEROptions options(512);
  CHECK(options.num_experts() == Grid(1024, 1024));
  CHECK(options.heads() == 8);
  CHECK(options.num_experts_per_head() == 16);
  CHECK(options.dim_key() == 256);
  CHECK(options.query_norm() == "batch");
  CHECK(options.scores() == "softmax");
  CHECK(options.share_keys());
  CHECK(!options.key_norm());
}

TEST_CASE("keys start at the length of the root of a third") {
  for (const bool share_keys : {true, false}) {
    PEER layer(small().dim_key(32).share_keys(share_keys));
    for (const torch::Tensor& keys : {layer->router->row_keys, layer->router->col_keys}) {
      CHECK((keys.norm(2, {-1}) - std::sqrt(1.0 / 3)).abs().max().item<double>() < 1e-6);
    }
  }
}

TEST_CASE("with key_norm, only the directions of keys matter") {
  torch::manual_seed(0);
  PEER layer(small().key_norm(true));
  layer->eval();
  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({5, 8}), y = layer(x);
  layer->router->row_keys.mul_(torch::rand({4, 1}) + 0.1);
  layer->router->col_keys.mul_(1e6);
  CHECK(layer(x).allclose(y, 1e-5, 1e-6));
  layer->router->row_keys[1].zero_();  // no division by zero
  CHECK(std::get<0>(layer->router->effective_keys())[1].count_nonzero().item<int64_t>() == 0);
  CHECK(layer(x).isfinite().all().item<bool>());
}

TEST_CASE("a folded key norm leaves the outputs as they are") {
  PEER layer(small().key_norm(true));
  layer->eval();
  layer->router->freeze_keys(torch::tensor({true, false, false, false}),
                             torch::zeros({6}, torch::kBool));
  const torch::NoGradGuard no_grad;
  layer->router->row_keys.mul_(torch::rand({4, 1}) + 0.1);
  layer->router->col_keys.mul_(torch::rand({6, 1}) + 0.1);
  const torch::Tensor x = torch::randn({5, 8}), y = layer(x);
  peer::nn::fold_key_norm(*layer);
  CHECK(!layer->router->options.key_norm());
  CHECK(layer(x).equal(y));
  CHECK((layer->router->row_keys.norm(2, {-1}) - std::sqrt(1.0 / 3)).abs().max().item<double>() <
        1e-6);
  CHECK_THROWS_WITH(peer::nn::fold_key_norm(*layer), Catch::Contains("key_norm is true"));
  PEER copied = std::dynamic_pointer_cast<peer::nn::PEERImpl>(layer->clone());
  copied->eval();
  CHECK(copied(x).equal(y));
}

TEST_CASE("a layer maps all leading dimensions") {
  PEER layer(small());
  CHECK(layer(torch::randn({3, 7, 8})).sizes() == torch::IntArrayRef{3, 7, 8});
  layer->eval();
  CHECK(layer(torch::randn({8})).sizes() == torch::IntArrayRef{8});
  CHECK(layer(torch::randn({0, 8})).sizes() == torch::IntArrayRef{0, 8});
}

TEST_CASE("a number that is no square names its neighbours") {
  CHECK_THROWS_WITH(Grid(24), Catch::Contains("4^2 = 16 and 5^2 = 25, or the grid {4, 6}"));
  CHECK_THROWS_WITH(Grid(7), !Catch::Contains("or the grid"));
  CHECK_THROWS_AS(Grid(0), c10::ValueError);
  CHECK_THROWS_AS(Grid(-4), c10::ValueError);
  CHECK_THROWS_AS(Grid(3, 0), c10::ValueError);
  CHECK_THROWS_AS(Grid(INT64_MAX), c10::ValueError);
  CHECK_THROWS_AS(Grid(INT64_MAX, 2), c10::ValueError);
}

TEST_CASE("options out of range are refused by name") {
  CHECK_THAT(refusal(small(0)), Catch::Contains("dim to be positive"));
  CHECK_THAT(refusal(small().heads(0)), Catch::Contains("heads to be positive"));
  CHECK_THAT(refusal(small().dim_key(3)), Catch::Contains("an even dim_key"));
  CHECK_THAT(refusal(small().dim_key(2).key_norm(true)),
             Catch::Contains("at least 4 with key_norm"));
  CHECK_THAT(refusal(small().num_experts_per_head(25)),
             Catch::Contains("between 1 and the number of experts 24"));
  CHECK_THAT(refusal(small().num_experts_per_head(1)),
             Catch::Contains("the router would get no gradient"));
  CHECK_THAT(refusal(small().scores("max")),
             Catch::Contains("'softmax', 'sigmoid', 'relu', got 'max'"));
  CHECK_THAT(refusal(small().query_norm("group")),
             Catch::Contains("'batch', 'layer', 'rms' or none, got 'group'"));
  CHECK_THROWS_AS(peer::nn::QueryNorm(peer::nn::QueryNormOptions("rms", 2, 4).kind("group")),
                  c10::ValueError);
  CHECK_THROWS_AS(peer::nn::QueryNorm(peer::nn::QueryNormOptions("rms", 0, 4)), c10::ValueError);
  CHECK_THAT(refusal(small().activation("swish")), Catch::Contains("got 'swish'"));
  CHECK_THAT(refusal(small().dropout(1.5)), Catch::Contains("dropout between 0 and 1"));
}

TEST_CASE("what does not fit the layer is refused") {
  PEER layer(small());
  const torch::Tensor x = torch::randn({3, 8});
  CHECK_THROWS_AS(layer(torch::randn({3, 7})), c10::ValueError);
  CHECK_THROWS_AS(layer(torch::randn({})), c10::ValueError);
  CHECK_THROWS_AS(layer(x, torch::zeros({3})), c10::TypeError);
  CHECK_THROWS_AS(layer(x, torch::zeros({2}, torch::kBool)), c10::ValueError);
  const auto ids = torch::zeros({3, 2, 3}, torch::kLong);
  CHECK_THROWS_AS(layer->experts(x, torch::ones({3, 2, 2}), ids), c10::ValueError);
  CHECK_THROWS_AS(layer->experts(x, torch::ones({4, 2, 3}), torch::zeros({4, 2, 3}, torch::kLong)),
                  c10::ValueError);
  CHECK_THROWS_AS(layer->experts(x, torch::ones({3, 2, 3}), ids + 24), c10::IndexError);
}

TEST_CASE("a copy is equal, and stands alone") {
  for (const bool glu : {false, true}) {
    PEER layer(small().glu(glu).query_bias(glu).dropout(0.25));
    const torch::Tensor x = torch::randn({5, 8});
    layer(x);
    layer->eval();
    const auto copied = std::dynamic_pointer_cast<peer::nn::PEERImpl>(layer->clone());
    REQUIRE(copied);
    CHECK(copied->dropout == 0.25);
    const torch::Tensor before = layer(x);
    copied->eval();
    CHECK(copied->forward(x).equal(before));
    torch::NoGradGuard no_grad;
    copied->experts->w_up().zero_();
    CHECK(layer(x).equal(before));
    CHECK(copied->forward(x).count_nonzero().item<int64_t>() == 0);
  }
}

TEST_CASE("a copy keeps the request for gradients in float32") {
  PEER layer(small());
  layer->to(torch::kBFloat16);
  layer->experts->weight.set_grad_dtype(torch::kFloat32);
  const auto copied = std::dynamic_pointer_cast<peer::nn::PEERImpl>(layer->clone());
  REQUIRE(copied);
  copied->forward(torch::randn({5, 8}, torch::kBFloat16)).sum().backward();
  CHECK(copied->experts->weight.grad().scalar_type() == torch::kFloat32);
}

TEST_CASE("layers share a pool") {
  PEER first(small());
  PEER second(peer::nn::ProductKeyRouter(small().router()), first->experts, 0.1);
  CHECK(second->experts->weight.is_same(first->experts->weight));
  CHECK(second->num_experts() == 24);
  CHECK_THROWS_AS(PEER(peer::nn::ProductKeyRouter(small(9).router()), first->experts),
                  c10::ValueError);
  CHECK_THROWS_AS(
      PEER(peer::nn::ProductKeyRouter(small().num_experts(25).router()), first->experts),
      c10::ValueError);
}

TEST_CASE("a layer stands in a Sequential, and its mask may be left out") {
  torch::nn::Sequential model(torch::nn::Linear(6, 8), PEER(small()), torch::nn::Linear(8, 2));
  CHECK(model->forward(torch::randn({5, 6})).sizes() == torch::IntArrayRef{5, 2});
}

TEST_CASE("options of device and dtype reach every parameter") {
  PEER layer(small().dtype(torch::kDouble).glu(true).query_bias(true));
  for (const auto& parameter : layer->named_parameters()) {
    INFO(parameter.key());
    CHECK(parameter.value().scalar_type() == torch::kDouble);
  }
  PEER shapes(small().device(torch::kMeta).query_norm(std::nullopt));
  CHECK(shapes(torch::empty({5, 8}, torch::kMeta)).sizes() == torch::IntArrayRef{5, 8});
}

template <typename Optimizer>
void check_that_it_trains_sparse_tables(Optimizer&& optimizer, PEER& layer) {
  const torch::Tensor x = torch::randn({5, 8}), before = layer->experts->weight.detach().clone();
  layer(x).square().sum().backward();
  const torch::Tensor grad = layer->experts->weight.grad();
  REQUIRE(grad.is_sparse());
  optimizer.step();
  const torch::Tensor moved = (layer->experts->weight.detach() - before).abs().sum({1, 2}) > 0;
  CHECK(moved.equal(grad.to_dense().abs().sum({1, 2}) > 0));
}

TEST_CASE("torch::optim takes the sparse gradients of the tables") {
  PEER layer(small().sparse_grad(true));
  const auto tables = layer->experts->parameters();
  check_that_it_trains_sparse_tables(torch::optim::SGD(tables, 0.1), layer);
  layer->zero_grad();
  check_that_it_trains_sparse_tables(torch::optim::Adagrad(tables, 0.1), layer);
}

TEST_CASE("the parts of the experts are views of their rows") {
  for (const bool glu : {false, true}) {
    peer::nn::ExpertPool pool(small().glu(glu).experts());
    const torch::NoGradGuard no_grad;
    const int64_t parts = glu ? 3 : 2;
    CHECK(pool->weight.sizes() == torch::IntArrayRef{24, parts, 8});
    pool->w_down().fill_(1);
    pool->w_up().fill_(2);
    CHECK(pool->w_gate().defined() == glu);
    CHECK(pool->weight.select(1, 0).eq(1).all().item<bool>());
    CHECK(pool->weight.select(1, parts - 1).eq(2).all().item<bool>());
    CHECK((!glu || pool->w_gate().equal(pool->weight.select(1, 1))));
  }
}

TEST_CASE("it prints its options") {
  std::ostringstream text;
  text << *PEER(small().query_norm("rms"));
  CHECK_THAT(text.str(), Catch::Contains("num_experts={4, 6}"));
  CHECK_THAT(text.str(), Catch::Contains("key_norm=false"));
  CHECK_THAT(text.str(), Catch::Contains("kind=rms"));
  CHECK_THAT(text.str(), Catch::Contains("peer::nn::ExpertPool(dim=8, num_experts=24"));
}

TEST_CASE("reset_parameters starts again") {
  torch::manual_seed(3);
  PEER layer(small());
  const torch::Tensor x = torch::randn({5, 8});
  layer(x);
  torch::manual_seed(3);
  layer->reset_parameters();
  torch::manual_seed(3);
  PEER fresh(small());
  for (const auto& item : fresh->named_parameters()) {
    INFO(item.key());
    CHECK(layer->named_parameters()[item.key()].equal(item.value()));
  }
  CHECK(layer->router->norm->num_batches_tracked.item<int64_t>() == 0);
  CHECK(layer->router->norm->running_mean.equal(torch::zeros({8})));
}

TEST_CASE("torch::save and torch::load take the modules") {
  PEER layer(small()), other(small());
  layer(torch::randn({5, 8}));
  std::stringstream file;
  torch::save(layer, file);
  torch::load(other, file);
  layer->eval(), other->eval();
  const torch::Tensor x = torch::randn({5, 8});
  CHECK(other(x).equal(layer(x)));
}

TEST_CASE("a batch without finite statistics does not count") {
  const double junk = GENERATE(std::numeric_limits<double>::infinity(),
                               std::numeric_limits<double>::quiet_NaN(), 3e38);
  const bool is_masked = GENERATE(false, true);
  PEER layer(small());
  const torch::Tensor x = torch::randn({5, 8});
  const torch::Tensor mask = is_masked ? torch::arange(5) >= 4 : torch::Tensor();
  layer(x, mask);
  const auto& norm = *layer->router->norm;
  const torch::Tensor mean = norm.running_mean.clone(), variance = norm.running_var.clone();
  torch::Tensor bad = x.clone();
  bad[0][0] = junk;
  layer(bad, mask);
  CHECK(norm.running_mean.equal(mean));
  CHECK(norm.running_var.equal(variance));
  CHECK(norm.num_batches_tracked.item<int64_t>() == 1);
  layer(x + 1, mask);
  CHECK_FALSE(norm.running_mean.equal(mean));
  CHECK(norm.running_mean.isfinite().all().item<bool>());
  CHECK(norm.num_batches_tracked.item<int64_t>() == 2);
}
