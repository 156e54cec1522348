#include "peer/state_dict.h"

#include <ATen/core/Dict.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/export.h>
#include <torch/csrc/jit/serialization/pickler.h>

#include <map>
#include <vector>

#include "nn/masks.h"
#include "nn/state_file.h"

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

}  // namespace peer
