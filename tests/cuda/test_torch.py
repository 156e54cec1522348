"""How the operators behave under Torch on a GPU: autograd, graphs, streams, compile, errors."""

from __future__ import annotations

import copy

import pytest
import torch

import peer


def bits(tensor):
    dense = tensor.coalesce().values() if tensor.is_sparse else tensor
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return dense.detach().contiguous().view(integers[dense.element_size()])


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(bits(a), bits(b))


def make_layer(**options):
    torch.manual_seed(0)
    options = {"num_experts": 32**2, "heads": 4, "num_experts_per_head": 8, **options}
    return peer.PEER(64, dim_key=32, device="cuda", **options)


def train(layer, x):
    layer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())]


def test_gradients_agree_with_finite_differences(
    make_expert_inputs, make_retrieval_inputs, sized, glu
):
    tokens, per_token, experts, dim = sized((5, 6, 11, 9), (2, 3, 4, 3))
    inputs = make_expert_inputs(
        tokens=tokens, per_token=per_token, experts=experts, dim=dim, dtype=torch.float64, glu=glu
    )
    leaves = [t.cuda().requires_grad_(t.is_floating_point()) for t in inputs]
    assert torch.autograd.gradcheck(peer.functional.expert_mlp, leaves, nondet_tol=0.0)
    # The double backward uses torch's index_add, which adds atomically on a GPU.
    assert torch.autograd.gradgradcheck(peer.functional.expert_mlp, leaves, nondet_tol=1e-10)
    retrieval = [
        t.cuda().requires_grad_()
        for t in make_retrieval_inputs(tokens=sized(3, 1), dtype=torch.float64)
    ]

    def scores(*tensors):
        return peer.functional.product_key_topk(*tensors, k=4)[0]

    assert torch.autograd.gradcheck(scores, retrieval)


@pytest.mark.needs_gpu("torch's tracing asks the driver for the device of a tensor")
def test_opcheck(make_expert_inputs, make_retrieval_inputs, on_gpu):
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    inputs = on_gpu(make_expert_inputs(glu=True)).requiring_grad()
    torch.library.opcheck(torch.ops.peer.expert_mlp.default, (*inputs, "gelu"))
    retrieval = on_gpu(make_retrieval_inputs()).requiring_grad()
    torch.library.opcheck(torch.ops.peer.product_key_topk.default, (*retrieval, 4))


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_every_run(sized, dtype, sparse_grad):
    layer = make_layer(sparse_grad=sparse_grad, dtype=dtype)
    x = torch.randn(sized(700, 20), 64, device="cuda", dtype=dtype)
    first = train(layer, x)
    for _ in range(5):
        assert_same_bits(train(layer, x), first)


def test_a_token_gets_the_same_bits_alone_and_in_a_batch(
    make_expert_inputs, on_gpu, sized, dtype, glu
):
    tokens = sized(600, 30)
    inputs = on_gpu(
        make_expert_inputs(tokens=tokens, per_token=70, experts=300, dim=136, dtype=dtype, glu=glu)
    )
    x, weights, indices, table = inputs
    together = torch.ops.peer.expert_mlp(*inputs, "gelu", False)
    backward = torch.ops.peer.expert_mlp_backward(
        together[0], *inputs, *together[1:], "gelu", False, (True, True, False)
    )
    for t in range(0, tokens, tokens // 6):
        part = x[t : t + 1], weights[t : t + 1], indices[t : t + 1], table
        alone = torch.ops.peer.expert_mlp(*part, "gelu", False)
        assert_same_bits(alone[:1], [together[0][t : t + 1]])
        grads = torch.ops.peer.expert_mlp_backward(
            alone[0], *part, *alone[1:], "gelu", False, (True, True, False)
        )
        assert_same_bits(grads[:2], [grad[t : t + 1] for grad in backward[:2]])


def test_on_a_stream_of_its_own(sized):
    layer = make_layer()
    x = torch.randn(sized(300, 20), 64, device="cuda")
    expected = train(layer, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # so that work on another stream would run too early
        late = x * 1
        found = train(layer, late)
    stream.synchronize()
    assert_same_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(make_expert_inputs):
    inputs = [t.to("cuda:1") for t in make_expert_inputs()]
    with torch.cuda.device(0):
        out = torch.ops.peer.expert_mlp(*inputs, "gelu", True)[0]
    assert out.device == torch.device("cuda:1")
    expected = torch.ops.peer.expert_mlp(*make_expert_inputs(), "gelu", True)[0]
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_a_graph_replays_forward_and_backward(sized):
    layer = make_layer(query_norm="layer")
    x = torch.randn(sized(300, 20), 64, device="cuda", requires_grad=True)

    def step():
        for parameter in (x, *layer.parameters()):
            if parameter.grad is not None:
                parameter.grad.zero_()
        y = layer(x)
        y.square().sum().backward()
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    found = [t.clone() for t in (y, x.grad, *(p.grad for p in layer.parameters()))]
    assert_same_bits([t + 0.0 for t in found], [t + 0.0 for t in train(layer, x)])


def test_a_graph_replays_retrieval_with_the_mask_of_now(make_retrieval_inputs, on_gpu):
    """Neither the filter nor the scan waits for the device."""
    inputs = on_gpu(make_retrieval_inputs(tokens=20, rows=30, columns=20, integers=True))
    disabled = torch.zeros(600, dtype=torch.bool, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.ops.peer.product_key_topk(*inputs, 8, disabled)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = torch.ops.peer.product_key_topk(*inputs, 8, disabled)
    for first in (300, 8):  # half of the experts are enabled, or k
        disabled.copy_(torch.arange(600) >= first)
        graph.replay()
        expected = torch.ops.peer.product_key_topk(
            *(tensor.cpu() for tensor in inputs), 8, disabled.cpu()
        )
        assert_same_bits([each.cpu() for each in results], expected)


@pytest.mark.parametrize("share", [None, 0.5, 1.0], ids=["no mask", "some frozen", "all frozen"])
def test_a_graph_replays_fused_updates(make_expert_inputs, on_gpu, sized, share):
    """A backward pass that updates the table, without a gradient in between."""
    inputs = on_gpu(make_expert_inputs(tokens=sized(200, 20), per_token=16, experts=300, dim=64))
    x, weights, indices, table = inputs
    state = torch.zeros(300, 2, device="cuda")
    generator = torch.Generator().manual_seed(0)
    frozen = None if share is None else (torch.rand(300, generator=generator) < share).cuda()

    def update(table, state):
        out, hidden, gate = torch.ops.peer.expert_mlp(x, weights, indices, table, "gelu", False)
        torch.ops.peer.expert_mlp_backward_rowwise_adagrad_(
            *(out, x, weights, indices, table, hidden, gate, "gelu", state),
            *(0.1, 1e-10, 0.0),
            frozen=frozen,
        )

    expected_table, expected_state = table.clone(), state.clone()
    for _ in range(4):
        update(expected_table, expected_state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    warm_table, warm_state = table.clone(), state.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        update(warm_table, warm_state)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        update(table, state)
    for _ in range(4):
        graph.replay()
    assert_same_bits([table, state], [expected_table, expected_state])


def test_a_graph_replays_gradients_by_the_mask_of_the_replay(make_expert_inputs, on_gpu, sized):
    inputs = on_gpu(make_expert_inputs(tokens=sized(200, 20), per_token=16, experts=300, dim=64))
    generator = torch.Generator().manual_seed(0)
    masks = [(torch.rand(300, generator=generator) < share).cuda() for share in (0.5, 0.2, 1.0)]
    out, hidden, gate = torch.ops.peer.expert_mlp(*inputs, "gelu", False)

    def gradients(frozen):
        return torch.ops.peer.expert_mlp_backward(
            out, *inputs, hidden, gate, "gelu", False, (True,) * 3, frozen
        )

    expected = [gradients(mask) for mask in masks]
    torch.cuda.synchronize()
    frozen = masks[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(frozen)
    for mask, each in zip(masks, expected, strict=True):
        frozen.copy_(mask)
        graph.replay()
        assert_same_bits(found, each)


def test_sparse_gradients_cannot_be_captured():
    layer = make_layer(sparse_grad=True, query_norm="layer")
    x = torch.randn(20, 64, device="cuda")
    train(layer, x)
    with (
        pytest.raises(RuntimeError, match="sparse_grad=True cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer(x).square().sum().backward()


@pytest.mark.needs_gpu("torch.compile compiles for a GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_under_compile(mode):
    layer = make_layer()
    x = torch.randn(200, 64, device="cuda")
    expected = [t.clone() for t in train(copy.deepcopy(layer), x)]
    compiled = torch.compile(layer, mode=mode, fullgraph=True)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        layer.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)
        y.square().sum().backward()
        found = [y, leaf.grad, *(p.grad for p in layer.parameters())]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_under_autocast(sized):
    layer = make_layer()
    x = torch.randn(sized(200, 20), 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def make_two_pools(kind):
    """Two equal pools of 300 experts, each with its optimizer."""
    torch.manual_seed(0)
    pool = peer.ExpertPool(
        72, num_experts=300, num_experts_per_token=32, sparse_grad=True, device="cuda"
    )
    pools = pool, copy.deepcopy(pool)
    return [(each, getattr(peer.optim, kind)(each.parameters(), lr=0.1)) for each in pools]


@pytest.mark.parametrize("kind", ["RowwiseAdagrad", "SGD", "RowwiseAdam"])
@pytest.mark.parametrize("hot", [False, True], ids=["spread", "hot expert"])
def test_an_update_fused_into_backward_equals_a_gradient_and_a_step(sized, kind, hot):
    tokens = sized(400, 30)
    (pool, optimizer), (fused, fused_optimizer) = make_two_pools(kind)
    fused_optimizer.fuse_into_backward(fused)
    for _ in range(3):
        x = torch.randn(tokens, 72, device="cuda", requires_grad=True)
        weights = torch.rand(tokens, 4, 8, device="cuda", requires_grad=True)
        indices = torch.randint(300, (tokens, 4, 8), device="cuda")
        if hot:
            indices[torch.rand(indices.shape, device="cuda") < 0.8] = 7
        pool(x, weights, indices).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        fused(x, weights, indices).square().sum().backward()
        assert_same_bits(fused.parameters(), pool.parameters())


@pytest.mark.parametrize("kind", ["RowwiseAdagrad", "SGD", "RowwiseAdam"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "some frozen"])
def test_ids_that_are_not_sorted_again_give_the_same_bits(sized, kind, frozen):
    """Gradients of peer, against copies of them, whose ids the optimizer sorts."""
    tokens = sized(400, 30)
    (pool, optimizer), (copied, copied_optimizer) = make_two_pools(kind)
    if frozen:
        for each in (pool, copied):
            each.freeze_experts(torch.arange(300, device="cuda") % 3 == 0)
    for passes in (1, 1, 2):  # two passes add their gradients, with ids that repeat
        for _ in range(passes):
            x = torch.randn(tokens, 72, device="cuda")
            weights = torch.rand(tokens, 4, 8, device="cuda")
            indices = torch.randint(300, (tokens, 4, 8), device="cuda")
            pool(x, weights, indices).square().sum().backward()
        peer.optim.clip_grad_norm_(pool.parameters(), 1.0)
        copied.weight.grad = pool.weight.grad.clone()
        optimizer.step()
        copied_optimizer.step()
        assert_same_bits(copied.parameters(), pool.parameters())
        optimizer.zero_grad()


def test_ids_of_a_gradient_that_were_changed_end_in_an_error(run_python):
    """In a separate process, because the device is unusable afterwards."""
    snippet = """
import json, torch, peer
torch.manual_seed(0)
pool = peer.ExpertPool(
    8, num_experts=30, num_experts_per_token=4, sparse_grad=True, device="cuda"
)
optimizer = peer.optim.SGD(pool.parameters(), lr=0.1)
indices = torch.arange(12, device="cuda").view(3, 1, 4)
weights = torch.rand(3, 1, 4, device="cuda")
pool(torch.randn(3, 8, device="cuda"), weights, indices).sum().backward()
pool.weight.grad._indices()[0, 5] = 4
try:
    optimizer.step()
    torch.cuda.synchronize()
    print(json.dumps("nothing"))
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    assert "CUDA" in run_python(snippet)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_an_index_out_of_range_ends_in_an_error_that_names_it(run_python, backward):
    """In a separate process, because the device is unusable afterwards."""
    snippet = """
import json, sys, torch, peer
inputs = [torch.randn(3, 8), torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.long)]
inputs = [t.cuda() for t in (*inputs, torch.randn(5, 2, 8))]
hidden = torch.zeros(3, 4, device="cuda")
inputs[2][1, 2] = int(sys.argv[2])
try:
    if sys.argv[1] == "True":
        torch.ops.peer.expert_mlp_backward(
            inputs[0], *inputs, hidden, hidden[:0, 0], "gelu", True, (True,) * 3
        )
    else:
        torch.ops.peer.expert_mlp(*inputs, "gelu")
    torch.cuda.synchronize()
    print(json.dumps("nothing"))
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    for bad in (5, -1, 2**40):
        assert "CUDA" in run_python(snippet, backward, bad)


def test_fewer_than_k_enabled_experts_end_in_an_error(run_python):
    """In a separate process, because the device is unusable afterwards."""
    snippet = """
import json, torch, peer
inputs = [t.cuda() for t in (torch.randn(3, 2, 8), torch.randn(6, 4), torch.randn(7, 4))]
disabled = torch.arange(42).cuda() >= 3
try:
    torch.ops.peer.product_key_topk(*inputs, 4, disabled)
    torch.cuda.synchronize()
    print(json.dumps("nothing"))
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    assert "CUDA" in run_python(snippet)


def test_more_than_64_per_head_is_refused(make_retrieval_inputs, on_gpu):
    inputs = on_gpu(make_retrieval_inputs(rows=20, columns=20))
    with pytest.raises(ValueError, match="64"):
        torch.ops.peer.product_key_topk(*inputs, 65)


@pytest.mark.needs_gpu("operators see both devices as the CPU")
def test_tensors_on_different_devices_are_refused(make_expert_inputs, on_gpu):
    inputs = on_gpu(make_expert_inputs())
    for name in ("x", "indices", "table"):
        mixed = inputs._replace(**{name: getattr(inputs, name).cpu()})
        with pytest.raises(RuntimeError):
            torch.ops.peer.expert_mlp(*mixed, "gelu", False)


def test_a_layer_moves_to_the_gpu_and_back():
    torch.manual_seed(0)
    layer = peer.PEER(64, num_experts=32**2, heads=4, num_experts_per_head=8, dim_key=32).eval()
    x = torch.randn(50, 64)
    expected = layer(x)
    there = layer.cuda()(x.cuda())
    torch.testing.assert_close(there.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.cpu()(x), expected)
