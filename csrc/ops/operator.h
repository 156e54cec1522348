// A typed handle for an operator. Callers and kernels share one declaration of its parameters.
//
// Each operator has a struct of its arguments, whose members are the parameters of its schema in
// their order, and a name. Parameters that several operators share may be a struct in it, or its
// base:
//
//   struct ScaleArguments {
//     static constexpr const char* kName = "peer::scale";
//     const Tensor& x;
//     double factor;
//   };
//   using ScaleOp = Operator<ScaleArguments, Tensor(const Tensor&, double)>;
//
//   Tensor scale_cpu(const ScaleArguments& args) { return args.x * args.factor; }
//   TORCH_LIBRARY_IMPL(peer, CPU, m) { m.impl("scale", ScaleOp::kernel<scale_cpu>); }
//
//   ScaleOp::call(x, 2.0);
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace peer::ops {

using at::Tensor;

template <class Arguments, class Signature>
class Operator;

template <class Arguments, class Result, class... Parameters>
class Operator<Arguments, Result(Parameters...)> {
 public:
  // Calls the operator through the dispatcher, from the top.
  static Result call(Parameters... parameters) { return handle().call(parameters...); }

  // Calls the operator through the dispatcher, from the keys in `below` on.
  static Result redispatch(c10::DispatchKeySet below, Parameters... parameters) {
    return handle().redispatch(below, parameters...);
  }

  // Adapts a function of the struct to the dispatcher, which passes each argument separately.
  template <Result (*function)(const Arguments&)>
  static Result kernel(Parameters... parameters) {
    return function(Arguments{parameters...});
  }

  // The same, for a function that redispatches.
  template <Result (*function)(c10::DispatchKeySet, const Arguments&)>
  static Result wrapper(c10::DispatchKeySet keys, Parameters... parameters) {
    return function(keys, Arguments{parameters...});
  }

 private:
  static const c10::TypedOperatorHandle<Result(Parameters...)>& handle() {
    static const auto found = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow(Arguments::kName, "")
                                  .template typed<Result(Parameters...)>();
    return found;
  }
};

}  // namespace peer::ops
