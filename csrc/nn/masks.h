// Masks of experts and keys, which modules keep in buffers.
//
// A module registers a mask when it first marks something. A mask that marks nothing any more is an
// empty tensor, because a buffer cannot be unregistered. Files leave out empty masks, so a state
// has a mask only while it marks something, as in Python.
#pragma once

#include <torch/nn/module.h>

#include <optional>
#include <string_view>

namespace peer::nn {

// Whether the mask marks anything.
inline bool is_set(const torch::Tensor& mask) { return mask.defined() && mask.numel() > 0; }

// The mask as operators take it.
inline std::optional<torch::Tensor> as_optional(const torch::Tensor& mask) {
  return is_set(mask) ? std::optional(mask) : std::nullopt;
}

// Gives a buffer, which is also a member of the module, a value. Registers it if it has none yet.
void set_buffer(torch::nn::Module& module,
                const char* name,
                torch::Tensor& member,
                const torch::Tensor& value);

// Called by reset() of a copy, whose members are still those of the original: registers a buffer of
// the same size if the original has one.
void register_again(torch::nn::Module& module, const char* name, torch::Tensor& member);

// Whether a module's buffer is a mask, or the values that frozen keys keep, by its name.
bool is_mask_name(std::string_view name);

// A new mask (size) of ids or of a bool mask; of everything, if `experts` is undefined. Throws
// ValueError for another shape, TypeError for another dtype, IndexError for an id outside [0,
// size).
torch::Tensor as_mask(const torch::Tensor& experts, int64_t size, torch::Device device);

// The union of a mask, which may be undefined or empty, and another, as a new tensor; empty if it
// marks nothing.
torch::Tensor union_of(const torch::Tensor& mask, const torch::Tensor& more);

// The mask without what the other marks; empty if nothing is left.
torch::Tensor without(const torch::Tensor& mask, const torch::Tensor& fewer);

// The mask with more entries that it does not mark; itself if it is undefined or empty.
torch::Tensor with_more(const torch::Tensor& mask, int64_t count);

// Sets the marked rows of a gradient to zero, or drops them from a sparse gradient.
void clear_gradient(const torch::Tensor& parameter, const torch::Tensor& mask, int64_t dim = 0);

}  // namespace peer::nn
