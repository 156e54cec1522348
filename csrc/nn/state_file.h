// Reads a file that Python's `torch.save(state_dict, path)` wrote: a zip archive of a pickle, which
// describes the tensors, and of the bytes of every storage.
//
// A pickle is a program. The reader executes only the opcodes that make a dictionary of tensors,
// and raises an error for all others. So a file cannot run code, and a tensor cannot reach outside
// its storage.
#pragma once

#include <ATen/core/Tensor.h>
#include <caffe2/serialize/inline_container.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace peer::nn {

// Where the values of a tensor are in the file.
struct StoredTensor {
  std::string storage;
  at::ScalarType dtype;
  int64_t storage_size;  // in elements
  int64_t offset;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
};

class StateFile {
 public:
  // Throws c10::Error if the file is not such an archive or is damaged.
  explicit StateFile(const std::string& path);

  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }

  // The tensor, on the CPU. Tensors that share a storage in the file share memory.
  at::Tensor read(const StoredTensor& tensor);

 private:
  std::shared_ptr<at::DataPtr> storage(const StoredTensor& tensor);

  caffe2::serialize::PyTorchStreamReader archive_;
  size_t size_;  // of the file, in bytes
  std::map<std::string, std::shared_ptr<at::DataPtr>> storages_;
  std::map<std::string, StoredTensor> tensors_;
};

}  // namespace peer::nn
