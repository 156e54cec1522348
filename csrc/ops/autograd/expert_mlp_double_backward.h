// The derivative of expert_mlp's backward operator.
#pragma once

#include <string>
#include <vector>

#include "ops/autograd/saved.h"

namespace peer::ops::autograd {

struct ExpertMlpDoubleBackward : SavingNode {
  SavedVariable grad_out_, x_, weights_, indices_, w_down_, w_up_, w_gate_;
  std::string activation_;
  bool sparse_tables_ = false;

  std::string name() const override { return "PeerExpertMlpDoubleBackward"; }
  std::vector<SavedVariable*> saved() override {
    return {&grad_out_, &x_, &weights_, &indices_, &w_down_, &w_up_, &w_gate_};
  }
  void collect_arguments(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(activation_);
    args.collect(sparse_tables_);
  }
  variable_list apply(variable_list&& directions) override;
};

}  // namespace peer::ops::autograd
