#include "peer/nn/norms.h"

#include <torch/nn/functional/batchnorm.h>

#include <ostream>

#include "nn/factory.h"
#include "ops/checks.h"

namespace peer::nn {

using torch::Tensor;

namespace {

Tensor move_towards(const Tensor& running, const Tensor& target, const Tensor& factor) {
  return (running + factor * (target - running)).to(running.scalar_type());
}

}  // namespace

QueryNormImpl::QueryNormImpl(const QueryNormOptions& options) : options(options) {
  const auto& kind = options.kind();
  TORCH_CHECK_VALUE(!kind || *kind == "batch" || *kind == "layer" || *kind == "rms",
                    "expected query_norm to be one of 'batch', 'layer', 'rms' or none, got '",
                    kind.value_or(""), "'");
  TORCH_CHECK_VALUE(options.heads() >= 1 && options.dim_key() >= 1,
                    "expected heads and dim_key to be positive, got ", options.heads(), " and ",
                    options.dim_key());
  reset();
}

void QueryNormImpl::reset() {
  if (!options.kind()) {
    return;
  }
  const int64_t features = options.heads() * options.dim_key();
  const auto made_with = factory(options);
  weight = register_parameter("weight", torch::empty({features}, made_with));
  if (options.kind() != "rms") {
    bias = register_parameter("bias", torch::empty({features}, made_with));
  }
  if (options.kind() == "batch") {
    running_mean = register_buffer("running_mean", torch::zeros({features}, made_with));
    running_var = register_buffer("running_var", torch::ones({features}, made_with));
    num_batches_tracked =
        register_buffer("num_batches_tracked", torch::zeros({}, made_with.dtype(torch::kLong)));
  }
  reset_parameters();
}

void QueryNormImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  if (weight.defined()) {
    weight.fill_(1.0);
  }
  if (bias.defined()) {
    bias.zero_();
  }
  if (running_mean.defined()) {
    running_mean.zero_();
    running_var.fill_(1.0);
    num_batches_tracked.zero_();
  }
}

void QueryNormImpl::pretty_print(std::ostream& stream) const {
  stream << "peer::nn::QueryNorm(kind=" << options.kind().value_or("none")
         << ", heads=" << options.heads() << ", dim_key=" << options.dim_key()
         << ", eps=" << options.eps() << ")";
}

Tensor QueryNormImpl::forward(const Tensor& query, const Tensor& padding_mask) {
  if (!options.kind()) {
    return query;
  }
  if (options.kind() == "batch") {
    return uses_batch_statistics() && padding_mask.defined()
               ? normalise_unpadded(query, padding_mask)
               : normalise_batch(query);
  }
  const Tensor per_head = query.view({-1, options.heads(), options.dim_key()});
  if (options.kind() == "layer") {
    const Tensor normed = torch::layer_norm(per_head, {options.dim_key()}, {}, {}, options.eps());
    return normed.flatten(-2) * weight + bias;
  }
  return torch::rms_norm(per_head, {options.dim_key()}, {}, options.eps()).flatten(-2) * weight;
}

Tensor QueryNormImpl::normalise_batch(const Tensor& query) {
  // Not torch::nn::BatchNorm1d: its statistics cannot leave out masked tokens.
  const auto normalise = [&](const Tensor& mean, const Tensor& variance, double factor) {
    return torch::nn::functional::batch_norm(query, mean, variance,
                                             torch::nn::functional::BatchNormFuncOptions()
                                                 .weight(weight)
                                                 .bias(bias)
                                                 .training(uses_batch_statistics())
                                                 .momentum(factor)
                                                 .eps(options.eps()));
  };
  if (!uses_batch_statistics()) {
    return normalise(running_mean, running_var, 0.0);
  }
  const double factor =
      options.momentum() ? *options.momentum()
                         : 1.0 / (static_cast<double>(num_batches_tracked.item<int64_t>()) + 1.0);
  // The kernel moves copies, and a batch that must not count leaves the buffers alone.
  const Tensor mean = running_mean.clone(), variance = running_var.clone();
  Tensor normed = normalise(mean, variance, factor);
  count_batch(mean, variance, {});
  return normed;
}

Tensor QueryNormImpl::normalise_unpadded(const Tensor& query, const Tensor& padding_mask) {
  // Padding is filled with zeros. So shapes do not depend on the mask, and the values in the
  // padding, NaN included, enter neither the statistics nor a gradient.
  const Tensor padding = padding_mask.unsqueeze(-1);
  const Tensor values =
      query.masked_fill(padding, 0.0).to(ops::accumulation_type(query.scalar_type()));
  const Tensor count = padding_mask.logical_not().sum().to(values.scalar_type());
  const Tensor divisor = count.clamp_min(1.0);
  const Tensor mean = values.sum(0) / divisor;
  const Tensor deviation = (values - mean).masked_fill(padding, 0.0);
  const Tensor variance = deviation.square().sum(0) / divisor;
  move_running_statistics(mean.detach(), variance.detach(), count);
  const Tensor normed = deviation * (variance + options.eps()).rsqrt() * weight + bias;
  return normed.to(query.scalar_type());
}

void QueryNormImpl::move_running_statistics(const Tensor& mean,
                                            const Tensor& variance,
                                            const Tensor& count) {
  Tensor factor = (num_batches_tracked + 1).to(mean.scalar_type()).reciprocal();
  if (options.momentum()) {
    factor = torch::full_like(factor, *options.momentum());
  }
  const Tensor unbiased = variance * (count / (count - 1.0).clamp_min(1.0));
  count_batch(move_towards(running_mean, mean, factor), move_towards(running_var, unbiased, factor),
              count > 1.0);
}

// Replaces the running statistics by moved ones, if all are finite and the condition holds. The
// moved statistics are tested, not those of the batch, because a variance that is finite in float
// can overflow in a 16-bit buffer.
void QueryNormImpl::count_batch(const Tensor& mean,
                                const Tensor& variance,
                                const Tensor& condition) {
  const torch::NoGradGuard no_grad;
  Tensor is_counted = mean.isfinite().logical_and(variance.isfinite()).all();
  if (condition.defined()) {
    is_counted = is_counted.logical_and(condition);
  }
  num_batches_tracked.add_(is_counted);
  running_mean.copy_(torch::where(is_counted, mean, running_mean));
  running_var.copy_(torch::where(is_counted, variance, running_var));
}

}  // namespace peer::nn
