// The ids of the sparse gradients that peer makes ascend and are distinct, so an optimizer need not
// sort them again. The coalesced flag says so too, but autograd drops the flag when it stores the
// first gradient of a parameter. It keeps the storage of the ids, which peer therefore remembers.
#pragma once

#include <ATen/core/Tensor.h>

namespace peer::ops::cuda {

// Remembers the storage as long as it exists. All of its contents must be these ids.
void remember_distinct_ids(const at::Tensor& ids);

// Whether contiguous ids lie in a storage that is remembered. They were distinct and ascending when
// they were made. Whoever relies on it must check that nobody has written to the storage since.
bool were_made_distinct(const at::Tensor& contiguous_ids);

}  // namespace peer::ops::cuda
