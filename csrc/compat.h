// What differs between the supported versions of Torch, in one place.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <memory>

namespace peer {

// Autograd nodes are held by std::shared_ptr up to Torch 2.12 and by c10::intrusive_ptr from 2.13.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
template <class NodeType>
using NodePtr = std::shared_ptr<NodeType>;

template <class NodeType>
NodePtr<NodeType> make_node() {
  return NodePtr<NodeType>(new NodeType(), torch::autograd::deleteNode);
}
#else
template <class NodeType>
using NodePtr = c10::intrusive_ptr<NodeType>;

template <class NodeType>
NodePtr<NodeType> make_node() {
  return c10::make_intrusive<NodeType>();
}
#endif

}  // namespace peer
