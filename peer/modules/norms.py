"""Normalisations of the queries, over the batch or over each head's features.

Each module maps queries (T, H * dim_key) to the same shape and has a weight for every feature.
"""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["QUERY_NORMS", "BatchQueryNorm", "LayerQueryNorm", "RMSQueryNorm", "make_query_norm"]

QUERY_NORMS = ("batch", "layer", "rms", None)


class BatchQueryNorm(nn.BatchNorm1d):
    r"""Batch normalisation whose statistics exclude padding.

    In training, a feature :math:`q` becomes :math:`w (q - \mu) / \sqrt{\sigma^2 + \epsilon} + b`.
    Here :math:`\mu` and :math:`\sigma^2` are the mean and the biased variance of the feature over
    the tokens that are not padding. The running statistics move by `momentum` towards :math:`\mu`
    and the unbiased variance. In evaluation, the running statistics replace :math:`\mu` and
    :math:`\sigma^2`. Without padding, the module computes what `torch.nn.BatchNorm1d` does. Its
    state always has the same names.

    If a statistic would become infinite or NaN, the batch does not count: no running statistic
    moves, nor does `num_batches_tracked`. So one batch with an overflow, whose step is skipped,
    does not harm evaluation. The decision stays on the device.

    While `are_statistics_frozen` is set, training uses the running statistics, too, and does not
    move them.

    In data parallelism, each process normalises with the statistics of its own tokens. After
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)`, the statistics in training are those of
    the tokens of all processes of a group, without padding. The norm of a router stays a
    `BatchQueryNorm` then, on every device and with every backend. Every process must call the
    layer, forward and backward, equally often. In training, while there are several processes,
    second derivatives and TorchScript are not available, and a compiled graph breaks at the norm.

    Statistics of 16-bit queries are in float32. In training they depend on all tokens of the batch,
    so the routing of a token depends on later tokens.

    Args:
        num_features: H * dim_key.
        eps: added to the variance.
        momentum: fraction by which the running statistics move; None averages over all batches.
        device: device of the parameters and buffers.
        dtype: dtype of the parameters and floating-point buffers.
        is_synchronized: whether the statistics in training are those of all processes.
        process_group: the processes; None for all.

    Source: arXiv 2407.04153, table 2; arXiv 1907.05242.

    Example:
        >>> import torch
        >>> from peer.modules import BatchQueryNorm
        >>> query = torch.tensor([[1.0, 0.0], [3.0, 8.0], [99.0, 99.0]])
        >>> normed = BatchQueryNorm(2)(query, torch.tensor([False, False, True]))
        >>> normed[:2].round().tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
    """

    # Lets TorchScript drop the dead branch.
    __constants__ = [*nn.BatchNorm1d.__constants__, "is_synchronized"]  # noqa: RUF012

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        is_synchronized: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)
        self.are_statistics_frozen = False
        self.is_synchronized = is_synchronized
        self.process_group = process_group

    def forward(self, query: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Normalises queries.

        Args:
            query: (T, H * dim_key).
            padding_mask: (T,) bool, True for padding, which becomes the bias while the statistics
                of the batch are used. With fewer than two other tokens there is no unbiased
                variance, and the running statistics do not change.

        Returns:
            (T, H * dim_key), query's dtype.

        Raises:
            ValueError: T = 1 in training without a mask.
            RuntimeError: a scripted norm is synchronized and in training.
        """
        is_training = self.training and not self.are_statistics_frozen
        running_mean, running_var = self.running_mean, self.running_var
        uses_batch = is_training or running_mean is None
        if self.is_synchronized and is_training:
            if torch.jit.is_scripting():  # type: ignore[attr-defined]
                raise RuntimeError(
                    "TorchScript cannot synchronize batch normalisation between processes; script "
                    "the layer before SyncBatchNorm.convert_sync_batchnorm, or in evaluation mode"
                )
            elif _has_other_processes(self.process_group):
                return self._normalise_over_processes(query, padding_mask)
        if uses_batch and padding_mask is not None:
            return self._normalise_unpadded(query, padding_mask)
        batches = self.num_batches_tracked
        if not is_training or running_mean is None or running_var is None or batches is None:
            return F.batch_norm(
                query,
                running_mean,
                running_var,
                self.weight,
                self.bias,
                uses_batch,
                0.0,
                self.eps,
            )
        momentum = self.momentum
        factor = 1.0 / (float(batches) + 1.0) if momentum is None else momentum
        # The kernel moves copies, and a batch that must not count leaves the buffers alone.
        mean, variance = running_mean.clone(), running_var.clone()
        normed = F.batch_norm(query, mean, variance, self.weight, self.bias, True, factor, self.eps)
        _count_batch_(batches, running_mean, running_var, mean, variance, None)
        return normed

    def _normalise_unpadded(self, query: Tensor, padding_mask: Tensor) -> Tensor:
        # Filling padding with zeros keeps shapes independent of the mask, and values in the
        # padding, including NaN, out of the statistics and of all gradients.
        padding = padding_mask.unsqueeze(-1)
        values = query.masked_fill(padding, 0.0)
        if query.dtype == torch.float16 or query.dtype == torch.bfloat16:
            values = values.float()
        count = (~padding_mask).sum().to(values.dtype)
        divisor = count.clamp(min=1.0)
        mean = values.sum(0) / divisor
        deviation = (values - mean).masked_fill(padding, 0.0)
        variance = deviation.square().sum(0) / divisor
        if self.training and not self.are_statistics_frozen:
            self._update_running_statistics(mean.detach(), variance.detach(), count)
        normed = deviation * (variance + self.eps).rsqrt() * self.weight + self.bias
        return normed.to(query.dtype)

    @torch.jit.unused
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalise_over_processes(self, query: Tensor, padding_mask: Tensor | None) -> Tensor:
        if padding_mask is None:
            padding_mask = torch.zeros(len(query), dtype=torch.bool, device=query.device)
        values = query.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        values = values.to(torch.promote_types(query.dtype, torch.float32))
        normed, mean, variance, count = _NormaliseOverProcesses.apply(
            values, padding_mask.unsqueeze(-1), self.eps, self.process_group
        )
        self._update_running_statistics(mean, variance, count)
        affine: Tensor = normed * self.weight + self.bias
        return affine.to(query.dtype)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return super().extra_repr() + (", is_synchronized=True" if self.is_synchronized else "")

    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        running_mean, running_var = self.running_mean, self.running_var
        batches = self.num_batches_tracked
        if running_mean is None or running_var is None or batches is None:
            return
        # Nothing here requires grad. A torch.no_grad() block is not needed, and an exported program
        # that contains one can be saved but not loaded.
        factor = 1.0 / (batches + 1).to(mean.dtype)
        if self.momentum is not None:
            factor = torch.full_like(factor, self.momentum)
        unbiased = variance * (count / (count - 1.0).clamp(min=1.0))
        moved_mean = _lerp(running_mean, mean, factor)
        moved_var = _lerp(running_var, unbiased, factor)
        _count_batch_(batches, running_mean, running_var, moved_mean, moved_var, count > 1.0)


@torch.jit.unused
def _has_other_processes(group: Any) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


class _NormaliseOverProcesses(torch.autograd.Function):
    """Subtracts the mean and divides by the standard deviation over the tokens of all processes.

    Every process has one collective forward and one backward, on vectors of the number of features.
    Each contributes its mean and its sum of squared deviations, which are combined exactly, without
    the cancellation of a sum of squares.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, padding: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = (~padding).sum().to(values.dtype).view(1)
        mean = values.sum(0) / count.clamp(min=1.0)
        squares = (values - mean).masked_fill(padding, 0.0).square().sum(0)
        mine = torch.cat([mean, squares, count])
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, mine, group)
        features = values.shape[1]
        means, all_squares, counts = torch.stack(gathered).split([features, features, 1], 1)
        total = counts.sum()
        divisor = total.clamp(min=1.0)
        mean = (means * counts).sum(0) / divisor
        variance = (all_squares + counts * (means - mean).square()).sum(0) / divisor
        scale = (variance + eps).rsqrt()
        normed = ((values - mean) * scale).masked_fill(padding, 0.0)
        ctx.save_for_backward(normed, padding, scale, divisor)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, total)
        return normed, mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        normed, padding, scale, divisor = ctx.saved_tensors
        grad = grad.masked_fill(padding, 0.0)
        sums = torch.stack([grad.sum(0), (grad * normed).sum(0)])
        dist.all_reduce(sums, group=ctx.group)
        mean_grad, mean_product = sums / divisor
        grad_values = (grad - mean_grad - normed * mean_product) * scale
        return grad_values.masked_fill(padding, 0.0), None, None, None


def _lerp(running: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    return (running + factor * (target - running)).to(running.dtype)


def _count_batch_(
    batches: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    variance: Tensor,
    condition: Tensor | None,
) -> None:
    """Replaces the running statistics by moved ones, if all are finite and the condition holds.

    The decision stays on the device. It tests the moved statistics, not those of the batch, because
    a variance that is finite in float32 can overflow in a 16-bit buffer.
    """
    is_counted = (mean.isfinite() & variance.isfinite()).all()
    if condition is not None:
        is_counted = is_counted & condition
    batches.add_(is_counted)
    running_mean.copy_(torch.where(is_counted, mean, running_mean))
    running_var.copy_(torch.where(is_counted, variance, running_var))


class _HeadNorm(nn.Module):
    """The base of per-head normalisations: sizes, a weight and an optional bias."""

    has_bias: ClassVar[bool]

    def __init__(
        self,
        heads: int,
        dim_key: int,
        eps: float = 1e-5,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.dim_key, self.eps = heads, dim_key, eps
        features = heads * dim_key
        self.weight = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        if self.has_bias:
            self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to one and the bias to zero."""
        nn.init.ones_(self.weight)
        if self.has_bias:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"heads={self.heads}, dim_key={self.dim_key}, eps={self.eps}"


class LayerQueryNorm(_HeadNorm):
    r"""Layer normalisation of each head's query.

    A query :math:`q` of a head becomes
    :math:`w \odot (q - \mathrm{mean}(q)) / \sqrt{\mathrm{var}(q) + \epsilon} + b`. Every head has
    its own weight and bias.

    Args:
        heads: H.
        dim_key: query width per head.
        eps: added to the variance.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Example:
        >>> import torch
        >>> from peer.modules import LayerQueryNorm
        >>> norm = LayerQueryNorm(heads=2, dim_key=2)
        >>> norm(torch.tensor([[1.0, 3.0, 0.0, 8.0]])).round().tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """

    has_bias = True

    def forward(self, query: Tensor) -> Tensor:
        """Normalises queries (T, H * dim_key)."""
        per_head = query.view(-1, self.heads, self.dim_key)
        normed = F.layer_norm(per_head, [self.dim_key], None, None, self.eps)
        return normed.flatten(-2) * self.weight + self.bias


class RMSQueryNorm(_HeadNorm):
    r"""Root-mean-square normalisation of each head's query.

    A query :math:`q` of a head becomes :math:`w \odot q / \sqrt{\mathrm{mean}(q^2) + \epsilon}`.
    Every head has its own weight.

    Args:
        heads: H.
        dim_key: query width per head.
        eps: added to the mean square.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Example:
        >>> import torch
        >>> from peer.modules import RMSQueryNorm
        >>> norm = RMSQueryNorm(heads=2, dim_key=2)
        >>> norm(torch.tensor([[1.0, -1.0, 0.0, 8.0]])).square().round().tolist()
        [[1.0, 1.0, 0.0, 2.0]]
    """

    has_bias = False

    def forward(self, query: Tensor) -> Tensor:
        """Normalises queries (T, H * dim_key)."""
        per_head = query.view(-1, self.heads, self.dim_key)
        return F.rms_norm(per_head, [self.dim_key], None, self.eps).flatten(-2) * self.weight


def make_query_norm(
    kind: str | None,
    heads: int,
    dim_key: int,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> BatchQueryNorm | LayerQueryNorm | RMSQueryNorm | nn.Identity:
    """Makes the query normalisation with the name `kind`.

    Args:
        kind: "batch", "layer", "rms" or None.
        heads: H.
        dim_key: query width per head.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Returns:
        The module; `torch.nn.Identity` if `kind` is None.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> from peer.modules import make_query_norm
        >>> make_query_norm("rms", heads=2, dim_key=4)
        RMSQueryNorm(heads=2, dim_key=4, eps=1e-05)
    """
    if kind == "batch":
        return BatchQueryNorm(heads * dim_key, device=device, dtype=dtype)
    if kind == "layer":
        return LayerQueryNorm(heads, dim_key, device=device, dtype=dtype)
    if kind == "rms":
        return RMSQueryNorm(heads, dim_key, device=device, dtype=dtype)
    if kind is None:
        return nn.Identity()
    known = ", ".join(map(repr, QUERY_NORMS))
    raise ValueError(f"expected query_norm to be one of {known}, got {kind!r}")
