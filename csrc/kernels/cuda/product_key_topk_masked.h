// Retrieval among the enabled experts, from the best of all experts.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/product_key_topk.h"

namespace peer::cuda {

// Writes the results of a retrieval with a mask. `best` is the same retrieval without the mask and
// with the largest k; it was queued before, and its results may be overwritten afterwards.
template <class Query>
void keep_enabled(const ProductKeyTopk<Query>& best,
                  const ProductKeyTopk<Query>& retrieval,
                  const Context& context);

}  // namespace peer::cuda
