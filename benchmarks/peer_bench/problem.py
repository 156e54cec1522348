"""The tensors of a case, made once: all providers read the same table, inputs and ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import peer
from peer_bench.cases import DTYPES, Case
from peer_bench.machine import CPU, Machine


class Problem:
    """The parameters and the inputs. Inputs take turns, so that caches do not hold the rows.

    The routers are `peer.ProductKeyRouter`s, and the table is that of a `peer.ExpertPool`.

    Args:
        case: the sizes.
        distributions: of the ids. "router" means the ids that the first router retrieves.
        seed: of torch's random numbers.
        machine: holds the tensors.

    Raises:
        ValueError: the machine is another device than the case's.
    """

    def __init__(
        self, case: Case, distributions: tuple[str, ...], seed: int = 0, machine: Machine = CPU
    ) -> None:
        if case.device != machine.kind:
            raise ValueError(f"the case is for {case.device}, the machine is {machine.kind}")
        self.case = case
        self.machine = machine
        self.device = machine.device
        self.table_dtype = DTYPES[case.dtype]
        self.dtype = case.activation_dtype
        torch.manual_seed(seed)
        self.routers = [
            peer.ProductKeyRouter(
                case.dim,
                num_experts=case.num_experts,
                heads=case.heads,
                num_experts_per_head=case.k,
                dim_key=case.dim_key,
                device=self.device,
                dtype=self.dtype,
            )
            for _ in range(case.routers)
        ]
        self.frozen: Tensor | None = None
        if case.frozen:
            order = torch.randperm(case.num_experts, device=self.device)
            self.frozen = order < case.num_experts * case.frozen // 100
        self.weight = self.make_pool(self.device).weight
        # The same memory for providers that take one table (2N, D) or two tables (N, D).
        table = self.weight.detach()
        self.rows = nn.Parameter(table.view(-1, case.dim))
        self.w_down, self.w_up = (nn.Parameter(part) for part in table.unbind(1))
        self.inputs = count_inputs(case, machine.last_level_cache)
        shape = (case.tokens, case.heads, case.k)
        self.x = [self._draw(case.tokens, case.dim).to(self.dtype) for _ in range(self.inputs)]
        self.grad_out = self._draw(case.tokens, case.dim).to(self.dtype)
        # In float32, as peer's router returns them. Plain PyTorch has them in the activations'.
        self.weights = self._draw(*shape).sort(descending=True).values.softmax(-1)
        self.ids: dict[str, list[Tensor]] = {}
        for distribution in distributions:
            exponent = parse_exponent(distribution)
            if exponent is not None:
                self.ids[distribution] = [
                    draw_ids(shape, case.num_experts, exponent).to(self.device) for _ in self.x
                ]
        self._retrieved: dict[int, Tensor] = {}

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def make_pool(
        self, device: torch.device | str = "meta", *, sparse_grad: bool = True
    ) -> peer.ExpertPool:
        """A pool of the case's sizes; on "meta" for a pool that will get the problem's table."""
        pool = peer.ExpertPool(
            self.case.dim,
            num_experts=self.case.num_experts,
            num_experts_per_token=self.case.per_token,
            sparse_grad=sparse_grad,
            device=device,
            dtype=self.table_dtype,
        )
        pool.frozen = self.frozen
        return pool

    def parameters(self) -> list[nn.Parameter]:
        """Everything that may get a gradient."""
        routers = [parameter for router in self.routers for parameter in router.parameters()]
        return [self.weight, self.rows, self.w_down, self.w_up, *routers]

    def get_x(self, index: int) -> Tensor:
        """The input of the call with this index."""
        return self.x[index % self.inputs]

    def get_ids(self, distribution: str, index: int) -> Tensor | None:
        """The drawn ids (T, H, K) of a call, None if the router's own are used."""
        ids = self.ids.get(distribution)
        return ids[index % self.inputs] if ids else None

    @torch.no_grad()
    def retrieve(self, index: int) -> Tensor:
        """The ids (T, H, K) that the first router retrieves for an input, in training."""
        index %= self.inputs
        if index not in self._retrieved:
            router = self.routers[0].train(self.case.tokens > 1)
            self._retrieved[index] = router(self.x[index])[1]
        return self._retrieved[index]

    def count_distinct(self, distribution: str) -> float:
        """U, the number of distinct experts of an input, the frozen ones too: the mean of two."""
        drawn = self.ids.get(distribution) or [self.retrieve(index) for index in range(2)]
        return sum(ids.unique().numel() for ids in drawn[:2]) / 2


def count_inputs(case: Case, cache: int) -> int:
    """The number of inputs, from 4 to 64: their rows are 4 times the last-level cache.

    Args:
        case: the sizes.
        cache: bytes of the last-level cache.
    """
    rows = case.tokens * case.per_token * 2 * case.dim * case.itemsize
    return min(64, max(4, -(-4 * cache // rows)))


def parse_exponent(distribution: str) -> float | None:
    """The exponent of "zipf:1.0"; 0 for "uniform", None for "router".

    Raises:
        ValueError: it is none of these.
    """
    if distribution == "router":
        return None
    kind, _, exponent = {"uniform": "zipf:0"}.get(distribution, distribution).partition(":")
    try:
        value = float(exponent)
    except ValueError:
        value = -1.0
    if kind != "zipf" or not 0.0 <= value < float("inf"):
        raise ValueError(
            f"expected a distribution such as uniform, zipf:1.0 or router, got {distribution!r}"
        )
    return value


def zipf_probabilities(num_experts: int, exponent: float) -> Tensor:
    """P(rank r) = r^-exponent / Σ r^-exponent for the ranks 1 to N, in float64."""
    weights = torch.arange(1, num_experts + 1, dtype=torch.float64).pow_(-exponent)
    return weights / weights.sum()


def draw_ids(shape: tuple[int, ...], num_experts: int, exponent: float) -> Tensor:
    """Independent ids in [0, N) whose popularity is Zipf's; uniform for exponent 0.

    The expert of each rank is drawn, too: popular experts are spread over the table.
    """
    if exponent == 0.0:
        return torch.randint(num_experts, shape)
    experts = torch.randperm(num_experts)
    cumulative = zipf_probabilities(num_experts, exponent).cumsum(0)
    ranks = torch.searchsorted(cumulative, torch.rand(shape, dtype=torch.float64), right=True)
    return experts[ranks.clamp_(max=num_experts - 1)]
