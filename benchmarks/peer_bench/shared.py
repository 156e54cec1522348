"""The tensors of a case, made once: all providers read the same table, inputs and ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import peer
from peer.bench.cases import DTYPES, Case
from peer.bench.distributions import draw_ids, parse_exponent
from peer.bench.machine import CPU, Machine

__all__ = ["Router", "Shared", "count_inputs"]


@dataclass
class Router:
    """Parameters of a router, as `peer.ProductKeyRouter` has them."""

    query_weight: nn.Parameter
    norm_weight: nn.Parameter
    norm_bias: nn.Parameter
    row_keys: nn.Parameter
    col_keys: nn.Parameter

    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return list(vars(self).values())


class Shared:
    """Parameters, and inputs of which several take turns, so that caches do not hold the rows.

    Args:
        case: the sizes.
        distributions: of the ids; for "router" they are what this router retrieves.
        seed: of everything random.
        machine: where everything is; of the case's device.

    Raises:
        ValueError: the machine is another device than the case's.
    """

    def __init__(
        self,
        case: Case,
        distributions: tuple[str, ...],
        seed: int = 0,
        machine: Machine = CPU,
    ) -> None:
        if case.device != machine.kind:
            raise ValueError(f"the case is for {case.device}, the machine is {machine.kind}")
        self.case = case
        self.machine = machine
        self.device = machine.device
        self.table_dtype = DTYPES[case.dtype]
        self.dtype = case.activation_dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # Ids are drawn on the CPU, and moved.
        is_cpu = self.device.type == "cpu"
        ids_generator = self.generator if is_cpu else torch.Generator().manual_seed(seed)
        self.routers = [self._make_router() for _ in range(case.routers)]
        table = self._table()
        self.weight = nn.Parameter(table)
        # The same memory for what takes one table (2N, D), or two (N, D), with their own gradients.
        self.rows = nn.Parameter(table.view(-1, case.dim))
        self.w_down, self.w_up = (nn.Parameter(part) for part in table.unbind(1))
        self.inputs = count_inputs(case, machine.last_level_cache)
        self.x = [self._draw(case.tokens, case.dim).to(self.dtype) for _ in range(self.inputs)]
        shape = (case.tokens, case.heads, case.k)
        # In float32, as peer's router has them; plain ones have them in the activations' dtype.
        self.weights = self._draw(*shape).sort(descending=True).values.softmax(-1)
        self.grad_out = self._draw(case.tokens, case.dim).to(self.dtype)
        self._retrieved: dict[int, Tensor] = {}
        self.ids: dict[str, list[Tensor]] = {}
        for distribution in distributions:
            exponent = parse_exponent(distribution)
            if exponent is not None:
                self.ids[distribution] = [
                    draw_ids(shape, case.num_experts, exponent, ids_generator).to(self.device)
                    for _ in self.x
                ]

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def _table(self) -> Tensor:
        case = self.case
        shape = case.num_experts, 2, case.dim
        table = peer.empty_huge(*shape, dtype=self.table_dtype, device=self.device)  # as a pool's
        for part, std in zip(table.unbind(1), (case.dim**-0.5, case.per_token**-0.5), strict=True):
            for rows in part.split(4096):  # what is not contiguous is filled slowly
                values = torch.empty_like(rows, memory_format=torch.contiguous_format)
                rows.copy_(values.normal_(std=std, generator=self.generator))
        return table

    def _normal(self, *shape: int, std: float) -> nn.Parameter:
        values = torch.empty(*shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(values.normal_(std=std, generator=self.generator))

    def _make_router(self) -> Router:
        case, half = self.case, self.case.dim_key // 2
        features = case.heads * case.dim_key
        keys = [
            nn.Parameter(
                torch.empty(case.root, half, dtype=self.dtype, device=self.device).uniform_(
                    -(half**-0.5), half**-0.5, generator=self.generator
                )
            )
            for _ in range(2)
        ]
        return Router(
            self._normal(features, case.dim, std=case.dim**-0.5),
            nn.Parameter(torch.ones(features, dtype=self.dtype, device=self.device)),
            nn.Parameter(torch.zeros(features, dtype=self.dtype, device=self.device)),
            *keys,
        )

    def parameters(self) -> list[nn.Parameter]:
        """Everything that may get a gradient."""
        routers = [parameter for router in self.routers for parameter in router.parameters()]
        return [self.weight, self.rows, self.w_down, self.w_up, *routers]

    @torch.no_grad()
    def retrieve(self, index: int) -> Tensor:
        """The ids that the first router retrieves for an input, in training."""
        index %= self.inputs
        if index not in self._retrieved:
            case, router = self.case, self.routers[0]
            query = self.x[index] @ router.query_weight.T
            if case.tokens > 1:
                query = (query - query.mean(0)) / (query.var(0, unbiased=False) + 1e-5).sqrt()
            query = query.to(self.dtype).view(-1, case.heads, case.dim_key)
            self._retrieved[index] = peer.functional.product_key_topk(
                query, router.row_keys, router.col_keys, case.k
            )[1]
        return self._retrieved[index]

    def drop_gradients(self) -> None:
        """Frees the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.grad = None

    def count_distinct(self, distribution: str) -> float:
        """U, the distinct experts of an input, the mean of two."""
        sets = self.ids.get(distribution) or [self.retrieve(index) for index in range(2)]
        sets = sets[:2]
        return sum(ids.unique().numel() for ids in sets) / len(sets)


def count_inputs(case: Case, cache: int) -> int:
    """How many inputs take turns: their rows are 4 times the last-level cache, 4 to 64 inputs.

    Args:
        case: the sizes.
        cache: bytes of the last-level cache.
    """
    rows = case.tokens * case.per_token * 2 * case.dim * case.itemsize
    return min(64, max(4, -(-4 * cache // rows)))
