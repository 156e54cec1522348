#include "ops/cuda/distinct_ids.h"

#include <algorithm>
#include <mutex>
#include <vector>

namespace peer::ops::cuda {

namespace {

// A storage that no longer exists keeps its address until its last weak pointer is gone, so no
// other storage is mistaken for it.
using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

struct Remembered {
  std::mutex mutex;
  std::vector<WeakStorage> storages;  // as many as there are sparse gradients
};

Remembered& remembered() {
  static Remembered all;
  return all;
}

}  // namespace

void remember_distinct_ids(const at::Tensor& ids) {
  const std::lock_guard lock(remembered().mutex);
  std::vector<WeakStorage>& storages = remembered().storages;
  storages.erase(std::remove_if(storages.begin(), storages.end(),
                                [](const WeakStorage& storage) { return storage.expired(); }),
                 storages.end());
  storages.push_back(ids.storage().getWeakStorageImpl());
}

bool were_made_distinct(const at::Tensor& contiguous_ids) {
  const c10::StorageImpl* const storage = contiguous_ids.storage().unsafeGetStorageImpl();
  const std::lock_guard lock(remembered().mutex);
  const std::vector<WeakStorage>& storages = remembered().storages;
  return std::any_of(storages.begin(), storages.end(),
                     [&](const WeakStorage& each) { return each._unsafe_get_target() == storage; });
}

}  // namespace peer::ops::cuda
