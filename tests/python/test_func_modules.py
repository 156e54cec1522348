"""`torch.func` on modules: per-sample gradients, ensembles, Jacobians and Hessians of a PEER."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
)

import peer

pytestmark = pytest.mark.usefixtures("no_slow_fallback")

SAMPLES = 3


def make_layer(seed: int = 0, **options) -> peer.PEER:
    torch.manual_seed(seed)
    options = {"query_norm": "layer", "dtype": torch.float64, **options}
    sizes = {"num_experts": (2, 3), "heads": 2, "num_experts_per_head": 2, "dim_key": 4}
    return peer.PEER(3, **sizes, **options)


@pytest.fixture(params=["batch", "layer", "rms", None], ids=str)
def layer(request, glu):
    """One layer of each kind that transforms support; batch normalisation is in eval mode."""
    options = {"glu": glu, "share_keys": not glu, "key_norm": glu}
    return make_layer(query_norm=request.param, **options).eval()


@pytest.fixture
def samples():
    """Sequences of two tokens."""
    return torch.randn(
        SAMPLES, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def parameters_of(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def direction_of(tensors, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in tensors.items()
    }


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def loss_of(module):
    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).sin().sum()

    return loss


def test_per_sample_gradients_equal_a_loop_of_backward_passes(layer, samples):
    ours = torch.vmap(grad(loss_of(layer)), (None, 0))(parameters_of(layer), samples)
    for i, sample in enumerate(samples):
        layer.zero_grad()
        layer(sample).sin().sum().backward()
        for name, parameter in layer.named_parameters():
            assert_close(ours[name][i], parameter.grad)


def test_compiled_per_sample_gradients_are_one_graph(samples):
    layer = make_layer()

    def per_sample(parameters, x):
        return torch.vmap(grad(loss_of(layer)), (None, 0))(parameters, x)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(per_sample, fullgraph=True, backend=counter)
    assert_close(compiled(parameters_of(layer), samples), per_sample(parameters_of(layer), samples))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_an_ensemble_equals_its_members(glu, samples):
    members = [make_layer(seed, glu=glu) for seed in range(SAMPLES)]
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")

    def member(parameters, buffers, x):
        return functional_call(skeleton, (parameters, buffers), (x,))

    outputs = torch.vmap(member, (0, 0, None))(parameters, buffers, samples)
    assert_close(outputs, torch.stack([module(samples) for module in members]))
    outputs.sin().sum().backward()
    for i, module in enumerate(members):
        module(samples).sin().sum().backward()
        for name, parameter in module.named_parameters():
            assert_close(parameters[name].grad[i], parameter.grad)


def test_an_ensemble_of_evaluated_layers_has_the_running_statistics_of_each(samples):
    members = [make_layer(seed, query_norm="batch") for seed in range(SAMPLES)]
    for module in members:
        module(samples)
        module.eval()
    skeleton = copy.deepcopy(members[0]).to("meta")
    outputs = torch.vmap(lambda *state: functional_call(skeleton, state, (samples,)))(
        *stack_module_state(members)
    )
    assert_close(outputs, torch.stack([module(samples) for module in members]))


def test_an_ensemble_has_tangents(samples):
    members = [make_layer(seed) for seed in range(SAMPLES)]
    parameters = {name: t.detach() for name, t in stack_module_state(members)[0].items()}
    direction = direction_of(parameters)

    def outputs(parameters):
        return torch.vmap(lambda p: functional_call(members[0], p, (samples,)))(parameters)

    _, tangent = jvp(outputs, (parameters,), (direction,))
    for i, module in enumerate(members):
        expected = jvp(
            lambda p, module=module: functional_call(module, p, (samples,)),
            ({name: t[i] for name, t in parameters.items()},),
            ({name: t[i] for name, t in direction.items()},),
        )[1]
        assert_close(tangent[i], expected)


def test_tangents_of_a_layer_pass_gradcheck(layer, samples):
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def outputs(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    arguments = (samples.requires_grad_(), *parameters)
    checks = {"check_backward_ad": False, "check_undefined_grad": False}
    assert gradcheck(outputs, arguments, check_forward_ad=True, fast_mode=True, **checks)


def test_tangents_of_a_layer_are_the_transpose_of_its_gradients(layer, samples):
    parameters = parameters_of(layer)
    direction = direction_of(parameters)

    def outputs(parameters):
        return functional_call(layer, parameters, (samples,))

    out, pull_back = vjp(outputs, parameters)
    _, tangent = jvp(outputs, (parameters,), (direction,))
    gradient = pull_back(out)[0]
    assert_close(
        (out * tangent).sum(), sum((gradient[name] * direction[name]).sum() for name in gradient)
    )


def test_jacobians_and_hessians_by_the_input_are_the_reference_s(layer, samples):
    x = samples[0]
    jacobian = jacfwd(layer)(x)
    assert_close(jacobian, jacrev(layer)(x))
    assert_close(jacobian, jacfwd(lambda x: peer.reference.peer(layer, x))(x))
    ours = hessian(lambda x: layer(x).sin().sum())(x)
    assert_close(ours, hessian(lambda x: peer.reference.peer(layer, x).sin().sum())(x))


def test_hessians_by_the_parameters_are_those_of_reverse_mode_twice(glu, samples):
    layer = make_layer(glu=glu)
    parameters = parameters_of(layer)

    def loss(parameters):
        return loss_of(layer)(parameters, samples[0])

    assert_close(hessian(loss)(parameters), jacrev(jacrev(loss))(parameters))


def test_hessian_vector_products_for_each_sample_equal_a_loop(layer, samples):
    parameters = parameters_of(layer)
    direction = direction_of(parameters)

    def product(x):
        def gradient(parameters):
            return grad(loss_of(layer))(parameters, x)

        return jvp(gradient, (parameters,), (direction,))[1]

    ours = torch.vmap(product)(samples)
    for i, sample in enumerate(samples):
        expected = product(sample)
        assert_close({name: t[i] for name, t in ours.items()}, expected)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's
def test_a_layer_can_be_linearized(layer, samples):
    parameters = parameters_of(layer)

    def outputs(x):
        return functional_call(layer, parameters, (x,))

    value, linear = linearize(outputs, samples)
    assert_close(value, layer(samples))
    assert_close(linear(samples.cos()), jvp(outputs, (samples,), (samples.cos(),))[1])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap_is_that_of_torch(samples, randomness):
    layer = make_layer(dropout=0.5)
    same = samples[:1].expand(16, -1, -1)
    outputs = torch.vmap(layer, randomness=randomness)(same)
    assert (outputs == outputs[0]).all().item() == (randomness == "same")


@pytest.mark.parametrize("transform", [grad, jacfwd, hessian])
def test_batch_statistics_under_a_transform_are_refused_and_unmoved(samples, transform):
    layer = make_layer(query_norm="batch")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="in-place operation"):
        transform(lambda x: layer(x).sum())(samples)
    assert_close(dict(layer.state_dict()), dict(before))


def test_batch_statistics_move_under_grad_where_buffers_are_arguments(samples):
    layer, twin = make_layer(query_norm="batch"), make_layer(query_norm="batch")

    def loss(parameters, buffers, x):
        return functional_call(layer, (parameters, buffers), (x,)).sin().sum()

    gradients = grad(loss)(parameters_of(layer), dict(layer.named_buffers()), samples)
    twin(samples).sin().sum().backward()
    for name, parameter in twin.named_parameters():
        assert_close(gradients[name], parameter.grad)
    assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))


def test_a_layer_under_no_grad_has_a_tangent_and_no_graph(samples):
    layer = make_layer()
    with torch.no_grad(), forward_ad.dual_level():
        out = forward_ad.unpack_dual(layer(forward_ad.make_dual(samples, samples.cos())))
    assert not out.tangent.requires_grad
    assert_close(out.tangent, jvp(layer, (samples,), (samples.cos(),))[1])


def test_a_pool_with_a_fused_update_refuses_a_tangent_by_a_sentence(samples):
    layer = make_layer()
    _, experts = peer.param_groups(layer, lr=1e-3, expert_lr=1e-2)
    optimizer = peer.optim.RowwiseAdagrad([experts])
    with optimizer.fuse_into_backward(layer), forward_ad.dual_level():
        x = forward_ad.make_dual(samples, samples.cos())
        with pytest.raises(NotImplementedError, match=r"fused into its backward pass.*no_grad"):
            layer(x)
        with torch.no_grad():
            assert forward_ad.unpack_dual(layer(x)).tangent is not None
