"""The operators as functions: the layer without its parameters.

TorchScript, `torch.compile`, `torch.export` and `torch.func` support every function here.
"""

import torch
from torch import Tensor

from peer._tracing import is_exporting

__all__ = ["ACTIVATIONS", "SCORES", "expert_mlp", "product_key_topk", "router_weights"]

# Activations of the hidden neuron: GELU by erf, GELU by tanh, ReLU, SiLU, none, and ReLU squared.
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "identity", "relu2")

# Functions that turn the scores of the retrieved experts into weights.
SCORES = ("softmax", "sigmoid", "relu")


def product_key_topk(
    query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int, disabled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Retrieves the k experts with the highest scores for every query.

    The experts form a grid of R rows and C columns. Expert :math:`(r, c)` has the id
    :math:`rC + c`. Its score for the query :math:`q = [q_1; q_2]` is the sum of two sub-scores:

    .. math:: s_{r,c}(q) = q_1^\top \text{row\_keys}_r + q_2^\top \text{col\_keys}_c .

    The result equals scoring all R·C experts, at the cost of R + C dot products per query. Sums
    are in float32, or in float64 for float64 inputs. An infinite sub-score counts as the largest
    finite number of its sign. NaN ranks highest. Equal scores are ordered by (row rank, column
    rank), smaller first. The rank of a key is its position among the keys of its half, sorted by
    sub-score and then by id.

    With `disabled`, the result equals scoring all experts in this order and striking out the
    disabled ones. A query costs more then, the more of its best experts are disabled.

    The query and both key matrices have gradients. Forward mode propagates their tangents to the
    scores. The ids are constants in both modes.

    Args:
        query: (..., H, dim_key), the queries of H heads. dim_key is even.
        row_keys: (R, dim_key / 2) if the heads share keys, or (H, R, dim_key / 2). query's dtype.
        col_keys: (C, dim_key / 2) or (H, C, dim_key / 2), like `row_keys`.
        k: experts per head, from 1 to R·C. At most 64 on CUDA.
        disabled: (R·C,) bool, True for experts that are never retrieved. At least k are False. None
            if all experts can be retrieved.

    Returns:
        Scores (..., H, k) in descending order, float32 or float64, and the ids of their experts
        (..., H, k), int64. The k ids of a head are distinct.

    Raises:
        ValueError: a shape does not fit, k is not in [1, R·C], or fewer than k experts are enabled.
            On CUDA, the last error ends the kernel with a message, as a bad index does.
        TypeError: a dtype is not supported, or the query and the keys have different dtypes.
        RuntimeError: the tensors are on different devices, or the device is not supported.

    Source: arXiv 2407.04153, equations 1, 4 and 5.

    Example:
        >>> import torch, peer
        >>> row_keys, col_keys = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0], [3.0]])
        >>> scores, indices = peer.functional.product_key_topk(
        ...     torch.ones(1, 1, 2), row_keys, col_keys, k=3
        ... )
        >>> scores.tolist(), indices.tolist()
        ([[[5.0, 3.0, 3.0]]], [[[5, 4, 2]]])
        >>> disabled = torch.tensor([False, False, False, False, False, True])
        >>> _, indices = peer.functional.product_key_topk(
        ...     torch.ones(1, 1, 2), row_keys, col_keys, k=3, disabled=disabled
        ... )
        >>> indices.tolist()
        [[[4, 2, 3]]]
    """
    flat = query
    if query.dim() > 3:
        flat = query.flatten(0, -3)
    elif query.dim() == 2:
        flat = query.unsqueeze(0)
    scores, indices = torch.ops.peer.product_key_topk(flat, row_keys, col_keys, k, disabled)
    shape = list(query.shape)
    shape[-1] = k
    return scores.view(shape), indices.view(shape)


def router_weights(scores: Tensor, function: str = "softmax") -> Tensor:
    r"""Turns the scores of the retrieved experts into the weights of their outputs.

    For the k scores :math:`s_1, \dots, s_k` of a head, weight i is
    :math:`e^{s_i} / \sum_j e^{s_j}` (softmax), :math:`1 / (1 + e^{-s_i})` (sigmoid) or
    :math:`\max(s_i, 0)` (relu). Softmax makes the experts of a head compete. Sigmoid and relu
    weight each expert independently.

    Args:
        scores: (..., k).
        function: "softmax", "sigmoid" or "relu".

    Returns:
        Weights (..., k), scores' dtype.

    Raises:
        ValueError: the function is unknown.

    Source: arXiv 2407.04153, equation 2.

    Example:
        >>> import torch, peer
        >>> peer.functional.router_weights(torch.tensor([2.0, 2.0]), "softmax")
        tensor([0.5000, 0.5000])
    """
    if function == "softmax":
        return scores.softmax(dim=-1)
    if function == "sigmoid":
        return scores.sigmoid()
    if function == "relu":
        return scores.relu()
    raise ValueError(f"router_weights: expected softmax, sigmoid or relu, got {function}")


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    table: Tensor,
    activation: str = "gelu",
    sparse_grad: bool = False,
    frozen: Tensor | None = None,
) -> Tensor:
    r"""Computes the weighted sum of the outputs of the experts that each token retrieved.

    An expert is an MLP with one hidden neuron. Its parameters are one row of the table. A token
    with the weights :math:`g_p` and experts :math:`e_p` has the output

    .. math:: y = \sum_p g_p\, \sigma(x^\top \text{down}_{e_p})
              \left[ x^\top \text{gate}_{e_p} \right] \text{up}_{e_p},

    with the factor in brackets only if the experts have gates. An expert that a token retrieved
    twice counts twice. Sums are in float32, or in float64 for float64 inputs. Their order does not
    depend on the number of threads.

    x, the weights and the table have gradients, and forward mode propagates their tangents. Frozen
    rows of the table are constants, as in

    .. code-block:: python

        torch.where(frozen[:, None, None], table.detach(), table)

    The output, and the gradients of x and the weights, do not depend on the mask. A backward pass
    uses the mask that its forward pass saw, even if the mask has been written in place since. In a
    graph that `torch.compile` optimised, such a write can instead be an error of autograd.

    Forward mode and second derivatives gather the retrieved rows: 2 * T * P * D elements, or
    3 * T * P * D with gates. The function and its first derivatives do not.

    Args:
        x: (..., D), float32, bfloat16, float16 or float64.
        weights: (..., H, K) or (..., P), any of these dtypes.
        indices: weights' shape, int64, in [0, N).
        table: (N, 2, D) with rows [down_e, up_e], or (N, 3, D) with rows [down_e, gate_e, up_e].
            Its dtype may differ from x's, but float64 goes with float64 only.
        activation: "gelu" (by erf), "gelu_tanh", "relu", "silu", "identity" or "relu2" (ReLU
            squared).
        sparse_grad: whether the table's gradient is a coalesced sparse tensor that holds only the
            retrieved rows. It cannot be differentiated again. If `torch.compile` meets the function
            while such a gradient is to be recorded, the graph breaks, and the function runs in
            eager mode.
        frozen: (N,) bool, True for frozen rows. Their gradient is zero. A sparse gradient does not
            hold them. None if no row is frozen.

    Returns:
        (..., D), x's dtype.

    Raises:
        ValueError: a shape does not fit, or the activation is unknown.
        TypeError: an argument has an unsupported dtype.
        IndexError: an index is outside [0, N).
        NotImplementedError: a sparse gradient is differentiated again, in either mode, or is needed
            under `vmap`.
        RuntimeError: the tensors are on different devices, or the device is not supported.

    Source: arXiv 2407.04153, equations 3, 6 and 7.

    Example:
        >>> import torch, peer
        >>> table = torch.tensor([
        ...     [[1.0, 0.0], [1.0, 2.0]],  # down and up of expert 0
        ...     [[0.0, 1.0], [0.0, 5.0]],
        ... ])
        >>> x = torch.tensor([[2.0, 3.0]])
        >>> weights, indices = torch.tensor([[0.5, 1.0]]), torch.tensor([[0, 1]])
        >>> peer.functional.expert_mlp(x, weights, indices, table, activation="relu")
        tensor([[ 1., 17.]])
    """
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        # An exported program has no backward pass, so the form of the gradient does not matter.
        is_compiling = torch.compiler.is_dynamo_compiling() and not is_exporting()
        if is_compiling and sparse_grad and table.requires_grad and torch.is_grad_enabled():
            return _eager_expert_mlp(x, weights, indices, table, activation, frozen)
    rows, row_weights, row_indices = flatten_tokens(x, weights, indices)
    out: Tensor = torch.ops.peer.expert_mlp(
        rows, row_weights, row_indices, table, activation, sparse_grad, frozen
    )[0]
    return out.view(x.shape)


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="peer::expert_mlp: the size of the gradient with sparse_grad=True is the number of "
    "retrieved experts, which is not known when a graph is traced; use sparse_grad=False for a "
    "whole graph"
)
def _eager_expert_mlp(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    table: Tensor,
    activation: str,
    frozen: Tensor | None,
) -> Tensor:
    return expert_mlp(x, weights, indices, table, activation, True, frozen)


def flatten_tokens(x: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flattens the arguments of `expert_mlp` to the shapes that the operator takes.

    Args:
        x: (..., D).
        weights: (..., H, K) or (..., P).
        indices: weights' shape.

    Returns:
        x (T, D), weights (T, P) and indices (T, P).

    Raises:
        ValueError: a shape does not fit.
    """
    # A tracer turns sizes into tensors and warns about every comparison.
    is_checked = not torch.jit.is_tracing()  # type: ignore[attr-defined]
    if is_checked and weights.shape != indices.shape:
        raise ValueError(
            f"peer::expert_mlp: expected weights of indices' shape {list(indices.shape)}, "
            f"got {list(weights.shape)}"
        )
    if weights.dim() == x.dim() + 1:
        weights = weights.flatten(-2)
        indices = indices.flatten(-2)
    if is_checked and (weights.dim() == 0 or weights.shape[:-1] != x.shape[:-1]):
        raise ValueError(
            f"peer::expert_mlp: expected weights of shape {list(x.shape[:-1])} + [experts per "
            f"token] or [heads, experts per head] to match x, got {list(weights.shape)}"
        )
    return _as_rows(x), _as_rows(weights), _as_rows(indices)


def _as_rows(tensor: Tensor) -> Tensor:
    """(..., n) to (T, n)."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)
