#include "peer/state_dict.h"

#include <ATen/core/Dict.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/export.h>
#include <torch/csrc/jit/serialization/pickler.h>

#include <algorithm>
#include <map>
#include <vector>

#include "nn/growth.h"
#include "nn/masks.h"
#include "nn/state_file.h"
#include "peer/nn.h"

namespace peer {

namespace {

using at::Tensor;
using nn::StoredTensor;

// Parameters and buffers in one map, as in Python's state_dict, which has no empty masks.
std::map<std::string, Tensor> state_of(const torch::nn::Module& module) {
  std::map<std::string, Tensor> state;
  for (const auto& parameter : module.named_parameters()) {
    state.emplace(parameter.key(), parameter.value().detach());
  }
  for (const auto& buffer : module.named_buffers()) {
    if (buffer.value().numel() > 0 || !nn::is_mask_name(buffer.key())) {
      state.emplace(buffer.key(), buffer.value());
    }
  }
  return state;
}

// One line for each difference between a saved state and the state of a module.
std::string differences(const std::map<std::string, StoredTensor>& saved,
                        const std::map<std::string, Tensor>& here) {
  std::string text;
  for (const auto& [name, tensor] : here) {
    const auto found = saved.find(name);
    if (found == saved.end()) {
      text += c10::str("\n  ", name, " is missing from the file");
    } else if (found->second.sizes != tensor.sizes()) {
      text += c10::str("\n  ", name, ": expected shape ", tensor.sizes(), ", got ",
                       at::IntArrayRef(found->second.sizes));
    }
  }
  for (const auto& entry : saved) {
    if (here.find(entry.first) == here.end()) {
      text += c10::str("\n  ", entry.first, " does not belong to the module");
    }
  }
  return text;
}

// The rows, in dimension `dim`, that a parameter lacks to have the shape of a state.
int64_t missing_rows(const std::map<std::string, StoredTensor>& saved,
                     const std::string& name,
                     const Tensor& parameter,
                     int64_t dim) {
  const auto found = saved.find(name);
  TORCH_CHECK_VALUE(found != saved.end(), "peer::grow_to: ", name, " is missing from the file");
  std::vector<int64_t> reached = parameter.sizes().vec();
  const std::vector<int64_t>& sizes = found->second.sizes;
  if (sizes.size() == reached.size()) {
    reached[dim] = std::max(reached[dim], sizes[dim]);
  }
  TORCH_CHECK_VALUE(sizes == reached, "peer::grow_to: ", name, ": expected shape ",
                    parameter.sizes(), " or one with more rows, got ", at::IntArrayRef(sizes));
  return sizes[dim] - parameter.size(dim);
}

// A part of a module, and the rows that it lacks.
template <class Part>
struct Growing {
  Part* part;
  std::string prefix;
  int64_t missing;
};

template <class Part>
bool has(const std::vector<Growing<Part>>& parts, const Part* part) {
  return std::any_of(parts.begin(), parts.end(),
                     [&](const Growing<Part>& each) { return each.part == part; });
}

// The masks of a file, and the values that frozen keys keep. What the file lacks is empty.
class SavedMasks {
 public:
  explicit SavedMasks(nn::StateFile& file) : file_(file) {}

  // Reads a mask, or the values that frozen keys keep, and checks its shape.
  void read(const std::string& prefix,
            const char* name,
            at::IntArrayRef sizes,
            const Tensor& like) {
    const auto found = file_.tensors().find(prefix + name);
    Tensor& value = values_[prefix + name];
    if (found == file_.tensors().end()) {
      value = at::empty({0}, like.options());
      return;
    }
    TORCH_CHECK_VALUE(at::IntArrayRef(found->second.sizes) == sizes, "peer::grow_to: ", prefix,
                      name, ": expected shape ", sizes, ", got ",
                      at::IntArrayRef(found->second.sizes));
    value = file_.read(found->second).to(like.options());
  }

  void set(torch::nn::Module& module, const std::string& prefix, const char* name, Tensor& member) {
    nn::set_buffer(module, name, member, values_.at(prefix + name));
  }

  bool has(const std::string& name) const { return nn::is_set(values_.at(name)); }

 private:
  nn::StateFile& file_;
  std::map<std::string, Tensor> values_;
};

}  // namespace

void save_state_dict(const torch::nn::Module& module, const std::string& path) {
  c10::Dict<std::string, Tensor> state;
  for (const auto& [name, tensor] : state_of(module)) {
    state.insert(name, tensor);
  }
  std::vector<char> names;
  // No type tags: Python reads them only with weights_only=False.
  torch::jit::Pickler pickler(
      [&](const char* bytes, size_t count) { names.insert(names.end(), bytes, bytes + count); },
      /*tensor_table=*/nullptr, /*type_renamer=*/nullptr, /*memoized_class_types=*/nullptr,
      /*get_tensor_id=*/nullptr, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(state);
  pickler.stop();
  // The values go to the file one by one, so the tables are not copied.
  caffe2::serialize::PyTorchStreamWriter file(path);
  torch::jit::writeArchiveAndTensors("data", names.data(), names.size(), pickler.tensorData(),
                                     file);
  file.writeEndOfFile();
}

void load_state_dict(torch::nn::Module& module, const std::string& path) {
  nn::StateFile file(path);
  const auto here = state_of(module);
  const std::string text = differences(file.tensors(), here);
  TORCH_CHECK_VALUE(text.empty(), "peer::load_state_dict: ", path,
                    " is not a state of this module:", text);
  // All values are read before the first is copied, so that a damaged file changes nothing.
  std::map<std::string, Tensor> values;
  for (const auto& [name, stored] : file.tensors()) {
    values.emplace(name, file.read(stored));
  }
  for (const auto& [name, tensor] : here) {
    tensor.copy_(values.at(name));
  }
}

void grow_to(torch::nn::Module& module, const std::string& path) {
  nn::StateFile file(path);
  SavedMasks masks(file);
  std::vector<Growing<nn::ExpertPoolImpl>> pools;
  std::vector<Growing<nn::ProductKeyRouterImpl>> routers;
  module.apply([&](const std::string& name, torch::nn::Module& part) {
    const std::string prefix = name.empty() ? "" : name + ".";
    if (auto* pool = dynamic_cast<nn::ExpertPoolImpl*>(&part); pool && !has(pools, pool)) {
      const int64_t missing = missing_rows(file.tensors(), prefix + "weight", pool->weight, 0);
      const int64_t experts = pool->weight.size(0) + missing;
      const Tensor mask = at::empty({0}, pool->weight.options().dtype(at::kBool));
      masks.read(prefix, "frozen", {experts}, mask);
      masks.read(prefix, "disabled", {experts}, mask);
      pools.push_back({pool, prefix, missing});
    }
    if (auto* router = dynamic_cast<nn::ProductKeyRouterImpl*>(&part);
        router && !has(routers, router)) {
      const Tensor& row_keys = router->row_keys;
      const int64_t missing =
          missing_rows(file.tensors(), prefix + "row_keys", row_keys, row_keys.dim() - 2);
      std::vector<int64_t> sizes = row_keys.sizes().vec();
      sizes[sizes.size() - 2] += missing;
      const Tensor mask = at::empty({0}, row_keys.options().dtype(at::kBool));
      masks.read(prefix, "frozen_rows", {sizes[sizes.size() - 2]}, mask);
      masks.read(prefix, "frozen_columns", {router->col_keys.size(-2)}, mask);
      masks.read(prefix, "kept_row_keys", sizes, row_keys);
      masks.read(prefix, "kept_col_keys", router->col_keys.sizes(), router->col_keys);
      masks.read(prefix, "frozen", {}, mask);
      routers.push_back({router, prefix, missing});
    }
  });
  TORCH_CHECK_VALUE(!pools.empty() || !routers.empty(),
                    "peer::grow_to: expected a module with a router or a pool of experts");
  for (const auto& [pool, prefix, missing] : pools) {
    if (missing > 0) {
      nn::require_growable((prefix + "weight").c_str(), pool->weight);
    }
  }
  for (const auto& [router, prefix, missing] : routers) {
    if (missing > 0) {
      nn::require_growable((prefix + "row_keys").c_str(), router->row_keys);
    }
  }

  for (const auto& [pool, prefix, missing] : pools) {
    if (missing > 0) {
      pool->append_experts(at::zeros({1}, pool->weight.options())
                               .expand({missing, pool->weight.size(1), pool->weight.size(2)}));
    }
    masks.set(*pool, prefix, "frozen", pool->frozen);
    masks.set(*pool, prefix, "disabled", pool->disabled);
  }
  for (const auto& [router, prefix, missing] : routers) {
    if (missing > 0) {
      std::vector<int64_t> sizes = router->row_keys.sizes().vec();
      sizes[sizes.size() - 2] = missing;
      router->append_row_keys(at::zeros(sizes, router->row_keys.options()));
    }
    masks.set(*router, prefix, "frozen_rows", router->frozen_rows);
    masks.set(*router, prefix, "frozen_columns", router->frozen_columns);
    masks.set(*router, prefix, "kept_row_keys", router->kept_row_keys);
    masks.set(*router, prefix, "kept_col_keys", router->kept_col_keys);
    if (masks.has(prefix + "frozen")) {
      router->freeze_network();
    } else {
      router->unfreeze_network();
    }
  }
}

}  // namespace peer
