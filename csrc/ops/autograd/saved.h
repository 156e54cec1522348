// What the autograd nodes of the operators share.
//
// The nodes are written by hand in the form of PyTorch's generated code. Only this form works
// everywhere: eager mode, torch.compile and compiled autograd, torch.func transforms, TorchScript,
// and C++ programs without Python.
#pragma once

#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "compat.h"

namespace peer::ops::autograd {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// A node that saves inputs of the operator and results without a history. A derived class lists
// these tensors once, in saved(), and its other arguments in collect_arguments().
class SavingNode : public Node {
 public:
  void release_variables() override {
    for (SavedVariable* variable : saved()) {
      variable->reset_data();
    }
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable* variable : const_cast<SavingNode*>(this)->saved()) {
      args.collect(*variable, /*is_output=*/false);
    }
    collect_arguments(args);
  }

  variable_list apply_with_saved(const variable_list& inputs,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable* variable : saved()) {
      swap.before(*variable);
    }
    variable_list result = apply(variable_list(inputs));
    for (SavedVariable* variable : saved()) {
      swap.after(*variable);
    }
    return result;
  }

 protected:
  virtual std::vector<SavedVariable*> saved() = 0;
  virtual void collect_arguments(torch::dynamo::autograd::CompiledNodeArgs&) const {}

  template <size_t count>
  std::array<bool, count> wanted_outputs() const {
    std::array<bool, count> wanted{};
    for (size_t i = 0; i < count; ++i) {
      wanted[i] = task_should_compute_output(i);
    }
    return wanted;
  }
};

// The node of an operator with these differentiable inputs; null if no gradient is required.
template <class NodeType, class... Tensors>
NodePtr<NodeType> make_node_if_required(const Tensors&... inputs) {
  if (!torch::autograd::compute_requires_grad(inputs...)) {
    return nullptr;
  }
  auto node = make_node<NodeType>();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

// For inputs and for results without a history alike: neither is an output of its own node.
inline SavedVariable save(const Tensor& tensor) {
  return SavedVariable(tensor, /*is_output=*/false);
}

}  // namespace peer::ops::autograd
