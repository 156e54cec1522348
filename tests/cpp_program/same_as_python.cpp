// Runs the layers that Python describes, and hands back what came out.
//
//   same_as_python CASES.pt RESULTS.pt
//
// CASES.pt is a list of dictionaries: options, seed, training, x, padding_mask (or none), and
// state, the path of a state to load; saved, the path to write the initial state to. RESULTS.pt is
// a list of dictionaries of tensors: y, and the gradients by name; the state after the forward pass
// is left in the file `saved` + ".after".
#include <peer/peer.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <fstream>
#include <iostream>
#include <iterator>

namespace {

using torch::IValue;

std::optional<std::string> string_or_none(const IValue& value) {
  return value.isNone() ? std::nullopt : std::optional<std::string>(value.toStringRef());
}

torch::Dtype dtype_named(const std::string& name) {
  return name == "float64"    ? torch::kDouble
         : name == "bfloat16" ? torch::kBFloat16
         : name == "float16"  ? torch::kHalf
                              : torch::kFloat;
}

peer::nn::PEEROptions parse(const c10::impl::GenericDict& given) {
  peer::nn::PEEROptions options(given.at("dim").toInt());
  for (const auto& entry : given) {
    const std::string name = entry.key().toStringRef();
    const IValue& value = entry.value();
    if (name == "dim") {
    } else if (name == "num_experts" && value.isInt()) {
      options.num_experts(value.toInt());
    } else if (name == "num_experts") {
      const auto grid = value.toTupleRef().elements();
      options.num_experts({grid[0].toInt(), grid[1].toInt()});
    } else if (name == "heads") {
      options.heads(value.toInt());
    } else if (name == "num_experts_per_head") {
      options.num_experts_per_head(value.toInt());
    } else if (name == "dim_key") {
      options.dim_key(value.toInt());
    } else if (name == "activation") {
      options.activation(value.toStringRef());
    } else if (name == "glu") {
      options.glu(value.toBool());
    } else if (name == "scores") {
      options.scores(value.toStringRef());
    } else if (name == "query_norm") {
      options.query_norm(string_or_none(value));
    } else if (name == "query_bias") {
      options.query_bias(value.toBool());
    } else if (name == "share_keys") {
      options.share_keys(value.toBool());
    } else if (name == "key_norm") {
      options.key_norm(value.toBool());
    } else if (name == "dropout") {
      options.dropout(value.toDouble());
    } else if (name == "sparse_grad") {
      options.sparse_grad(value.toBool());
    } else if (name == "zero_init_out") {
      options.zero_init_out(value.toBool());
    } else if (name == "dtype") {
      options.dtype(dtype_named(value.toStringRef()));
    } else {
      throw std::runtime_error("unknown option " + name);
    }
  }
  return options;
}

c10::Dict<std::string, torch::Tensor> run(const c10::impl::GenericDict& given) {
  torch::manual_seed(given.at("seed").toInt());
  peer::nn::PEER layer(parse(given.at("options").toGenericDict()));
  const std::string saved = given.at("saved").toStringRef();
  peer::save_state_dict(*layer, saved);

  peer::load_state_dict(*layer, given.at("state").toStringRef());
  layer->train(given.at("training").toBool());
  torch::manual_seed(given.at("seed").toInt() + 1);
  const torch::Tensor x = given.at("x").toTensor().clone().requires_grad_();
  const IValue mask = given.at("padding_mask");
  const torch::Tensor y = mask.isNone() ? layer(x) : layer(x, mask.toTensor());
  y.square().sum().backward();
  peer::save_state_dict(*layer, saved + ".after");

  c10::Dict<std::string, torch::Tensor> results;
  results.insert("y", y.detach());
  results.insert("x", x.grad());
  for (const auto& parameter : layer->named_parameters()) {
    const torch::Tensor& grad = parameter.value().grad();
    results.insert(parameter.key(), grad.is_sparse() ? grad.to_dense() : grad);
  }
  return results;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: same_as_python CASES.pt RESULTS.pt\n";
    return 2;
  }
  std::ifstream file(arguments[1], std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  c10::List<c10::Dict<std::string, torch::Tensor>> results;
  const IValue cases = torch::jit::pickle_load(bytes);
  for (const IValue& given : cases.toListRef()) {
    results.push_back(run(given.toGenericDict()));
  }
  const auto written = torch::jit::pickle_save(results);
  std::ofstream(arguments[2], std::ios::binary)
      .write(written.data(), static_cast<std::streamsize>(written.size()));
}
