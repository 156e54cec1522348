#pragma once

#include <peer/export.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>
#include <utility>

namespace peer::nn {

// Options of QueryNorm for H = heads queries of width dim_key.
struct PEER_API QueryNormOptions {
  QueryNormOptions(std::optional<std::string> kind, int64_t heads, int64_t dim_key)
      : kind_(std::move(kind)), heads_(heads), dim_key_(dim_key) {}

  // "batch", "layer", "rms", or none for the identity.
  TORCH_ARG(std::optional<std::string>, kind);
  TORCH_ARG(int64_t, heads);
  TORCH_ARG(int64_t, dim_key);
  // Added to the variance, or to the mean square.
  TORCH_ARG(double, eps) = 1e-5;
  // "batch": the weight of a new batch in the running statistics; none averages all batches.
  TORCH_ARG(std::optional<double>, momentum) = 0.1;
  TORCH_ARG(std::optional<torch::Device>, device);
  TORCH_ARG(std::optional<torch::Dtype>, dtype);
};

// Normalises queries (T, H·dim_key): each feature over the tokens ("batch"), or each head's query
// ("layer", "rms"). Every kind but the identity has a weight per feature.
//
// "batch" leaves padding out of its statistics. In evaluation it uses the running statistics. A
// batch after which a running statistic would be infinite or NaN does not count, and the running
// statistics stay as they are.
//
// State: weight, bias (not "rms"), and for "batch" running_mean, running_var, num_batches_tracked.
class PEER_API QueryNormImpl : public torch::nn::Cloneable<QueryNormImpl> {
 public:
  explicit QueryNormImpl(const QueryNormOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  // padding_mask: (T,) bool, true for padding, for "batch" only. Padding becomes the bias while the
  // statistics of the batch are used.
  torch::Tensor forward(const torch::Tensor& query, const torch::Tensor& padding_mask = {});

  QueryNormOptions options;
  torch::Tensor weight, bias;
  torch::Tensor running_mean, running_var, num_batches_tracked;
  // "batch": whether training uses the running statistics, too, and does not move them.
  bool are_statistics_frozen = false;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())})

 private:
  bool uses_batch_statistics() const { return is_training() && !are_statistics_frozen; }
  torch::Tensor normalise_batch(const torch::Tensor& query);
  torch::Tensor normalise_unpadded(const torch::Tensor& query, const torch::Tensor& padding_mask);
  void move_running_statistics(const torch::Tensor& mean,
                               const torch::Tensor& variance,
                               const torch::Tensor& count);
  void count_batch(const torch::Tensor& mean,
                   const torch::Tensor& variance,
                   const torch::Tensor& condition);
};

TORCH_MODULE(QueryNorm);

}  // namespace peer::nn
