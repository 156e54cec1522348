"""`torch.func`: grad, vmap, vmap of grad and jacrev are correct and use the batching rules."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("no_slow_fallback")


def test_the_slow_fallback_would_be_noticed():
    library = torch.library.Library("peer_without_rules", "DEF")
    try:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x + x, "CompositeExplicitAutograd")
        with pytest.raises(RuntimeError, match="vmap fallback"):
            torch.vmap(torch.ops.peer_without_rules.twice)(torch.ones(3))
    finally:
        library._destroy()


def experts(x, weights, indices, table):
    return torch.ops.peer.expert_mlp(x, weights, indices, table, "gelu")[0]


def retrieval(query, row_keys, col_keys):
    return torch.ops.peer.product_key_topk(query, row_keys, col_keys, 4)


def stack_of_calls(function, batched, *shared):
    """The definition of vmap: the function of each sample, stacked."""
    outputs = [function(*sample, *shared) for sample in zip(*batched, strict=True)]
    if isinstance(outputs[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
    return torch.stack(outputs)


@pytest.fixture
def inputs(make_expert_inputs, glu):
    return make_expert_inputs(dtype=torch.float64, glu=glu)


@pytest.fixture
def batches(make_expert_inputs, glu):
    """Three samples of five tokens with a shared table."""
    samples = [make_expert_inputs(dtype=torch.float64, glu=glu, seed=seed) for seed in (1, 2, 3)]
    x, weights, indices = (torch.stack([sample[i] for sample in samples]) for i in range(3))
    return x, weights, indices, samples[0].table


@pytest.mark.parametrize("argument", [0, 1, 3], ids=["x", "weights", "table"])
def test_grad_of_experts_equals_autograd(inputs, argument):
    def loss(*tensors):
        return experts(*tensors).square().sum()

    leaves = inputs.requiring_grad()
    loss(*leaves).backward()
    gradient = torch.func.grad(loss, argnums=argument)(*inputs)
    torch.testing.assert_close(gradient, leaves[argument].grad)


def test_grad_of_grad_of_experts_equals_double_backward(inputs):
    def directional(x):
        gradient = torch.func.grad(lambda x: experts(x, *inputs[1:]).square().sum())(x)
        return gradient.sin().sum()

    x = inputs.x.clone().requires_grad_()
    (first,) = torch.autograd.grad(experts(x, *inputs[1:]).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), x)
    torch.testing.assert_close(torch.func.grad(directional)(inputs.x), second)


def test_vmap_over_tokens_equals_the_batch(inputs):
    x, weights, indices, table = inputs

    def one_token(x, weights, indices):
        return experts(x[None], weights[None], indices[None], table)[0]

    torch.testing.assert_close(
        torch.vmap(one_token)(x, weights, indices), experts(*inputs), rtol=0, atol=0
    )


def test_vmap_over_batches_of_tokens_equals_a_loop(batches):
    x, weights, indices, table = batches
    torch.testing.assert_close(
        torch.vmap(lambda *sample: experts(*sample, table))(x, weights, indices),
        stack_of_calls(experts, (x, weights, indices), table),
    )


def test_vmap_takes_any_batch_dimension(batches):
    x, weights, indices, table = batches
    result = torch.vmap(lambda *sample: experts(*sample, table), in_dims=(2, 1, 2), out_dims=1)(
        x.movedim(0, 2), weights.movedim(0, 1), indices.movedim(0, 2)
    )
    expected = stack_of_calls(experts, (x, weights, indices), table)
    torch.testing.assert_close(result, expected.movedim(0, 1))


@pytest.mark.parametrize("batched", ["x", "weights", "indices"])
def test_vmap_over_one_argument_equals_a_loop(batches, batched):
    x, weights, indices, table = batches
    every = {"x": x, "weights": weights, "indices": indices}
    rest = {name: tensor[0] for name, tensor in every.items() if name != batched}

    def function(sample):
        arguments = {**rest, batched: sample}
        return experts(arguments["x"], arguments["weights"], arguments["indices"], table)

    torch.testing.assert_close(
        torch.vmap(function)(every[batched]), stack_of_calls(function, (every[batched],))
    )


def test_vmap_over_tables_equals_a_loop(make_expert_inputs, glu):
    # In an ensemble, each member has its own table.
    members = [make_expert_inputs(dtype=torch.float64, glu=glu, seed=seed) for seed in (1, 2, 3)]
    tables = torch.stack([member.table for member in members])

    def function(table):
        return experts(*members[0]._replace(table=table))

    torch.testing.assert_close(torch.vmap(function)(tables), stack_of_calls(function, (tables,)))


def test_vmap_of_grad_gives_per_sample_gradients(batches):
    x, weights, indices, table = batches

    gradient = torch.func.grad(lambda *inputs: experts(*inputs).square().sum(), argnums=3)
    per_sample = torch.vmap(gradient, in_dims=(0, 0, 0, None))(x, weights, indices, table)
    expected = stack_of_calls(gradient, (x, weights, indices), table)
    torch.testing.assert_close(per_sample, expected)


def test_vmap_of_grad_of_one_token_gives_gradients_of_x_and_weights(inputs):
    x, weights, indices, table = inputs

    def loss(x, weights, indices):
        return experts(x[None], weights[None], indices[None], table).square().sum()

    leaves = inputs.requiring_grad()
    experts(*leaves).square().sum().backward()
    gradients = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, weights, indices)
    torch.testing.assert_close(gradients, (leaves.x.grad, leaves.weights.grad))


def test_jacrev_of_experts_equals_the_jacobian(inputs):
    def function(x):
        return experts(x, *inputs[1:])

    torch.testing.assert_close(
        torch.func.jacrev(function)(inputs.x),
        torch.autograd.functional.jacobian(function, inputs.x),
    )


def test_jacrev_with_respect_to_the_table_equals_the_jacobian(inputs):
    def function(table):
        return experts(*inputs._replace(table=table))

    torch.testing.assert_close(
        torch.func.jacrev(function)(inputs.table),
        torch.autograd.functional.jacobian(function, inputs.table),
    )


# --- retrieval -----------------------------------------------------------------------------------


@pytest.fixture
def keys(make_retrieval_inputs, shared):
    return make_retrieval_inputs(dtype=torch.float64, shared=shared)


@pytest.fixture(params=[True, False], ids=["shared keys", "keys per head"])
def shared(request):
    return request.param


@pytest.mark.parametrize("argument", [0, 1, 2], ids=["query", "row_keys", "col_keys"])
def test_grad_of_retrieval_equals_autograd(keys, argument):
    def loss(*tensors):
        return retrieval(*tensors)[0].square().sum()

    leaves = keys.requiring_grad()
    loss(*leaves).backward()
    gradient = torch.func.grad(loss, argnums=argument)(*keys)
    torch.testing.assert_close(gradient, leaves[argument].grad)


def test_vmap_over_one_query_at_a_time_equals_the_batch(keys):
    scores, indices = torch.vmap(
        lambda query: tuple(part[0] for part in retrieval(query[None], *keys[1:]))
    )(keys.query)
    expected_scores, expected_indices = retrieval(*keys)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=0)
    assert torch.equal(indices, expected_indices)


def test_vmap_over_batches_of_queries_equals_a_loop(keys):
    query = torch.stack([keys.query, -keys.query, keys.query.flip(0)], dim=1)
    scores, indices = torch.vmap(lambda query: retrieval(query, *keys[1:]), in_dims=1)(query)
    expected_scores, expected_indices = stack_of_calls(retrieval, (query.unbind(1),), *keys[1:])
    torch.testing.assert_close(scores, expected_scores)
    assert torch.equal(indices, expected_indices)


def test_vmap_over_keys_equals_a_loop(make_retrieval_inputs, shared):
    members = [
        make_retrieval_inputs(dtype=torch.float64, shared=shared, seed=seed) for seed in (1, 2, 3)
    ]
    query = members[0].query
    row_keys, col_keys = (torch.stack([member[i] for member in members]) for i in (1, 2))

    def function(row_keys, col_keys):
        return retrieval(query, row_keys, col_keys)

    scores, indices = torch.vmap(function)(row_keys, col_keys)
    expected_scores, expected_indices = stack_of_calls(function, (row_keys, col_keys))
    torch.testing.assert_close(scores, expected_scores)
    assert torch.equal(indices, expected_indices)


def test_vmap_of_grad_of_retrieval_gives_per_sample_gradients(keys):
    query = torch.stack([keys.query, -keys.query, keys.query.flip(0)])

    def loss(row_keys, query):
        return retrieval(query, row_keys, keys.col_keys)[0].square().sum()

    gradient = torch.func.grad(loss)
    per_sample = torch.vmap(gradient, in_dims=(None, 0))(keys.row_keys, query)
    expected = torch.stack([gradient(keys.row_keys, sample) for sample in query])
    torch.testing.assert_close(per_sample, expected)


def test_jacrev_of_retrieval_equals_the_jacobian(keys):
    def function(query):
        return retrieval(query, *keys[1:])[0]

    torch.testing.assert_close(
        torch.func.jacrev(function)(keys.query),
        torch.autograd.functional.jacobian(function, keys.query),
    )
