// The operators of peer as C++ functions. Each calls the dispatcher, like torch.ops.peer.* in
// Python, so autograd, autocast and every device of the build apply.
#pragma once

#include <ATen/core/Tensor.h>
#include <peer/export.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace peer {

// Retrieves the k best experts of every token and head by product keys.
//
//   query     (T, H, dim_key)
//   row_keys  (R, dim_key / 2) shared by the heads, or (H, R, dim_key / 2)
//   col_keys  (C, dim_key / 2) or (H, C, dim_key / 2)
//   disabled  (R·C) bool, true for experts that are never retrieved; at least k must be false
//
// Returns scores (T, H, k), sorted descending, in float (double for double), and indices (T, H, k),
// int64; expert (r, c) has the id r·C + c.
PEER_API std::tuple<at::Tensor, at::Tensor> product_key_topk(
    const at::Tensor& query,
    const at::Tensor& row_keys,
    const at::Tensor& col_keys,
    int64_t k,
    const std::optional<at::Tensor>& disabled = {});

// The weights of retrieved experts from their scores (..., k), in the same shape and dtype:
// "softmax" over the k experts of a head, or "sigmoid" or "relu" of each score.
PEER_API at::Tensor router_weights(const at::Tensor& scores, std::string_view function = "softmax");

// The weighted sum of the retrieved experts:  out[t] = Σ_p weights[t, p]·act(<x[t], down_e>)·up_e,
// e = indices[t, p]; with gates, each term is multiplied by <x[t], gate_e>.
//
//   x (T, D)   weights, indices (T, P)
//   table (N, 2, D) with rows [down_e, up_e], or (N, 3, D) with rows [down_e, gate_e, up_e]
//   activation: "gelu", "gelu_tanh", "relu", "silu", "identity" or "relu2"
//   sparse_grad: the table's gradient is a coalesced sparse tensor that holds the retrieved rows
//   frozen (N), bool: these rows of the table are constants, and have no rows in a sparse gradient
//
// Returns out (T, D) in x's dtype.
PEER_API at::Tensor expert_mlp(const at::Tensor& x,
                               const at::Tensor& weights,
                               const at::Tensor& indices,
                               const at::Tensor& table,
                               std::string_view activation = "gelu",
                               bool sparse_grad = false,
                               const std::optional<at::Tensor>& frozen = {});

// An uninitialised CPU tensor on pages of 2 MB, if the system grants them. For tables whose rows
// are read at random.
PEER_API at::Tensor empty_huge(at::IntArrayRef size, at::ScalarType dtype = at::kFloat);

// The same, filled with zeros. Pages take no memory until they are written.
PEER_API at::Tensor zeros_huge(at::IntArrayRef size, at::ScalarType dtype = at::kFloat);

// The table with more rows of zeros. A tensor of empty_huge or zeros_huge is not copied on Linux:
// its storage grows, so that its views stay valid and see the same rows. Others are copied.
PEER_API at::Tensor append_zero_rows(const at::Tensor& table, int64_t rows);

}  // namespace peer
