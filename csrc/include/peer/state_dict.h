// Files of parameters and buffers by name, as Python's `torch.save(module.state_dict(), path)`
// writes and `torch.load(path, weights_only=True)` reads them.
#pragma once

#include <peer/export.h>
#include <torch/nn/module.h>

#include <string>

namespace peer {

// Writes the state of a module: one dictionary from names to tensors.
PEER_API void save_state_dict(const torch::nn::Module& module, const std::string& path);

// Reads a state into a module that was built with the options of the one it was saved from.
//
// Throws c10::Error, and leaves the module unchanged, if the file is damaged, if it holds anything
// but tensors by name, if a name is missing or unknown, or if a shape differs. The message lists
// every difference. Values of another dtype are converted. During loading, the file's contents are
// in memory beside the module.
PEER_API void load_state_dict(torch::nn::Module& module, const std::string& path);

// Gives the layers of a module the sizes and the masks of a state that a grown or frozen model
// saved. Afterwards, load_state_dict loads the state.
//
// Throws c10::Error, and leaves the module unchanged, if the file is damaged, if growth does not
// lead to its sizes, or while a parameter that must grow has a gradient or is part of a graph.
PEER_API void grow_to(torch::nn::Module& module, const std::string& path);

}  // namespace peer
