"""The contents of a layer's checkpoint, and that a layer is unchanged after saving and loading."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import peer

SIZES = {"num_experts": (8, 6), "heads": 3, "num_experts_per_head": 4, "dim_key": 8}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_layer(**options):
    return peer.PEER(10, **{**SIZES, **options})


def lived_in(layer):
    """The layer after one batch, so its running statistics are not the initial ones."""
    layer.train()(3 * torch.randn(50, 10) + 1)
    return layer.eval()


def assert_same_bits(state, other):
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert other[name].dtype == tensor.dtype, name
        assert torch.equal(other[name], tensor), name


# --- names, shapes, dtypes -----------------------------------------------------------------------

KEYS = {"router.row_keys": (8, 4), "router.col_keys": (6, 4)}
KEYS_PER_HEAD = {"router.row_keys": (3, 8, 4), "router.col_keys": (3, 6, 4)}
QUERY = {"router.query.weight": (24, 10)}
BIAS = {"router.query.bias": (24,)}
WEIGHT, OFFSET = {"router.norm.weight": (24,)}, {"router.norm.bias": (24,)}
STATISTICS = {
    "router.norm.running_mean": (24,),
    "router.norm.running_var": (24,),
    "router.norm.num_batches_tracked": (),
}
BATCH = {**WEIGHT, **OFFSET, **STATISTICS}
TABLE, WITH_GATES = {"experts.weight": (48, 2, 10)}, {"experts.weight": (48, 3, 10)}

# The format in docs/checkpoints.md. A change here breaks existing files.
STATES = {
    "defaults": ({}, {**KEYS, **QUERY, **BATCH, **TABLE}),
    "layer norm": ({"query_norm": "layer"}, {**KEYS, **QUERY, **WEIGHT, **OFFSET, **TABLE}),
    "rms norm": ({"query_norm": "rms"}, {**KEYS, **QUERY, **WEIGHT, **TABLE}),
    "no norm": ({"query_norm": None}, {**KEYS, **QUERY, **TABLE}),
    "bias": ({"query_bias": True}, {**KEYS, **QUERY, **BIAS, **BATCH, **TABLE}),
    "keys per head": ({"share_keys": False}, {**KEYS_PER_HEAD, **QUERY, **BATCH, **TABLE}),
    "key norm": ({"key_norm": True}, {**KEYS, **QUERY, **BATCH, **TABLE}),
    "gates": ({"glu": True}, {**KEYS, **QUERY, **BATCH, **WITH_GATES}),
    "all at once": (
        {"query_bias": True, "share_keys": False, "glu": True},
        {**KEYS_PER_HEAD, **QUERY, **BIAS, **BATCH, **WITH_GATES},
    ),
    "what leaves no trace": (
        {
            "num_experts_per_head": 2,
            "activation": "silu",
            "scores": "relu",
            "dropout": 0.5,
            "sparse_grad": True,
            "zero_init_out": True,
        },
        {**KEYS, **QUERY, **BATCH, **TABLE},
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_names_shapes_and_order_are_these(case):
    options, expected = STATES[case]
    state = make_layer(**options).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert list(state) == list(expected)  # the order of an optimizer's parameters
    for name, tensor in state.items():
        counts = name.endswith("num_batches_tracked")
        assert tensor.dtype == (torch.int64 if counts else torch.float32), name


def test_a_folded_norm_leaves_the_state_of_a_layer_without_one():
    layer = peer.fold_query_norm_(lived_in(make_layer()))
    plain = make_layer(query_norm=None, query_bias=True)
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 10)
    assert torch.equal(plain(x), layer(x))


def test_parts_have_the_layers_names_without_their_prefixes():
    layer = make_layer(glu=True, query_bias=True)
    state = {f"router.{name}": tensor for name, tensor in layer.router.state_dict().items()}
    state |= {f"experts.{name}": tensor for name, tensor in layer.experts.state_dict().items()}
    assert_same_bits(layer.state_dict(), state)


# --- files, in a new process ---------------------------------------------------------------------

IN_A_NEW_PROCESS = """
import json, os, sys, torch
from safetensors.torch import load_file, load_model
import peer
torch.set_num_threads(2)
os.chdir(sys.argv[1])
ways = {
    "torch": lambda layer: layer.load_state_dict(torch.load("layer.pt", weights_only=True)),
    "mmap": lambda layer: layer.load_state_dict(
        torch.load("layer.pt", weights_only=True, mmap=True), assign=True),
    "load_file": lambda layer: layer.load_state_dict(load_file("layer.safetensors")),
    "load_model": lambda layer: load_model(layer, "model.safetensors"),
}
same = {}
for case in sorted(os.listdir()):
    os.chdir(case)
    options = json.load(open("options.json"))
    options["dtype"] = getattr(torch, options["dtype"])
    expected = torch.load("expected.pt")
    for way, load in ways.items():
        layer = peer.PEER(10, **options).eval()
        load(layer)
        same[f"{case}, {way}"] = (
            torch.equal(layer(expected["x"]), expected["y"])
            and list(layer.state_dict()) == list(expected["state"])
            and all(torch.equal(t, expected["state"][n]) for n, t in layer.state_dict().items())
        )
    os.chdir("..")
print(json.dumps(same))
"""


def test_a_layer_comes_back_bit_by_bit_in_a_new_process(tmp_path, run_python):
    cases = {name: options for name, (options, _) in STATES.items()}
    cases["bfloat16"] = {"dtype": torch.bfloat16, "glu": True}
    cases["float16"] = {"dtype": torch.float16, "query_norm": "rms"}
    cases["float64"] = {"dtype": torch.float64, "share_keys": False}
    for name, options in cases.items():
        folder, kind = tmp_path / name, options.get("dtype", torch.float32)
        folder.mkdir()
        layer = make_layer(**options)
        layer.train()(3 * torch.randn(50, 10).to(kind) + 1)
        layer.eval()
        x = torch.randn(7, 10).to(kind)
        as_json = {**SIZES, **options, "dtype": str(kind).removeprefix("torch.")}
        (folder / "options.json").write_text(json.dumps(as_json))
        torch.save({"x": x, "y": layer(x), "state": layer.state_dict()}, folder / "expected.pt")
        torch.save(layer.state_dict(), folder / "layer.pt")
        save_file(layer.state_dict(), folder / "layer.safetensors")
        save_model(layer, folder / "model.safetensors")
    same = run_python(IN_A_NEW_PROCESS, tmp_path)
    assert len(same) == 4 * len(cases)
    assert [case for case, is_same in same.items() if not is_same] == []


# Model, optimizers and schedule of the run that is interrupted; once here, once in the new process.
RUN = """
import torch, peer

def make(dtype):
    torch.manual_seed(3)
    layer = peer.PEER(10, num_experts=64, heads=3, num_experts_per_head=4, dim_key=8, dropout=0.2,
                      sparse_grad=True)
    layer.experts.to(dtype)
    dense, experts = peer.param_groups(layer, lr=1e-2, expert_lr=0.1)
    return layer, [torch.optim.AdamW([dense]), peer.optim.RowwiseAdam([experts], seed=5)]

def train(layer, optimizers, steps):
    for step in steps:
        torch.manual_seed(step)  # the batch, and dropout
        x, y = torch.randn(2, 20, 10)
        torch.nn.functional.mse_loss(layer(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

def save(layer, optimizers, path):
    torch.save({"layer": layer.state_dict(), "optimizers": [o.state_dict() for o in optimizers]},
               path)

def load(layer, optimizers, path):
    saved = torch.load(path, weights_only=True)
    layer.load_state_dict(saved["layer"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
"""

RESUME = (
    RUN
    + """
import json, sys
torch.set_num_threads(2)
for name in ("float32", "bfloat16"):
    layer, optimizers = make(getattr(torch, name))
    load(layer, optimizers, f"{sys.argv[1]}/{name}-half.pt")
    train(layer, optimizers, range(4, 8))
    save(layer, optimizers, f"{sys.argv[1]}/{name}-resumed.pt")
print(json.dumps(True))
"""
)


@pytest.mark.long
def test_a_run_is_resumed_bit_by_bit_in_a_new_process(tmp_path, run_python):
    functions = {}
    exec(RUN, functions)
    make, train, save = (functions[name] for name in ("make", "train", "save"))
    whole = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        layer, optimizers = make(dtype)
        train(layer, optimizers, range(4))
        save(layer, optimizers, tmp_path / f"{name}-half.pt")
        at_half = layer.experts.weight.detach().clone()
        train(layer, optimizers, range(4, 8))
        assert not torch.equal(layer.experts.weight, at_half)
        whole[name] = layer.state_dict(), [optimizer.state_dict() for optimizer in optimizers]
    run_python(RESUME, tmp_path)
    for name, (state, optimizer_states) in whole.items():
        resumed = torch.load(tmp_path / f"{name}-resumed.pt", weights_only=True)
        assert_same_bits(state, resumed["layer"])
        for ours, theirs in zip(optimizer_states, resumed["optimizers"], strict=True):
            assert ours["state"].keys() == theirs["state"].keys()
            for i, values in ours["state"].items():
                for key, value in values.items():
                    assert torch.equal(
                        torch.as_tensor(value), torch.as_tensor(theirs["state"][i][key])
                    )


# --- shared and strided tables -------------------------------------------------------------------


def share_a_pool():
    first = make_layer()
    return nn.ModuleList([first, make_layer(experts=first.experts)])


def test_a_shared_pool_is_saved_once_and_stays_shared(tmp_path):
    model, other = share_a_pool(), share_a_pool()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    save_model(model, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith("experts.weight") for name in saved) == 1
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(model.state_dict(), tmp_path / "refused.safetensors")
    for load in (
        lambda: other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True)),
        lambda: load_model(other, tmp_path / "model.safetensors"),
    ):
        for each in other.parameters():
            nn.init.zeros_(each)
        load()
        assert other[0].experts.weight is other[1].experts.weight
        assert_same_bits(model.state_dict(), other.state_dict())


def test_a_table_that_is_a_view_comes_back(tmp_path):
    layer, other = make_layer().eval(), make_layer().eval()
    layer.experts.weight = nn.Parameter(torch.randn(48, 3, 10)[:, :2])
    x = torch.randn(5, 10)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    contiguous = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
    save_file(contiguous, tmp_path / "layer.safetensors")
    for state in (
        torch.load(tmp_path / "layer.pt", weights_only=True),
        load_file(tmp_path / "layer.safetensors"),
    ):
        other.load_state_dict(state)
        assert torch.equal(other(x), layer(x))
        assert other.experts.weight.is_contiguous()
    view = torch.load(tmp_path / "layer.pt", weights_only=True)
    other.load_state_dict(view, assign=True)
    assert other.experts.weight.stride() == (30, 10, 1)
    assert torch.equal(other(x), layer(x))


# --- without a first initialisation, and other dtypes --------------------------------------------


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_a_layer_on_the_meta_device_takes_the_loaded_tensors_as_they_are(tmp_path, mmap):
    layer = lived_in(make_layer(glu=True, query_bias=True))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = make_layer(glu=True, query_bias=True, device="meta").eval()
    state = torch.load(tmp_path / "layer.pt", weights_only=True, mmap=mmap)
    loaded.load_state_dict(state, assign=True)
    for name, tensor in loaded.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr(), name
    assert all(each.requires_grad for each in loaded.parameters())
    x = torch.randn(5, 10)
    assert torch.equal(loaded(x), layer(x))
    # Training does not change a memory-mapped file.
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    loaded(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(loaded.experts.weight, layer.experts.weight)
    again = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert_same_bits(layer.state_dict(), again)


def test_loading_casts_to_the_layers_dtype_and_assigning_keeps_the_files(dtype):
    state = lived_in(make_layer()).state_dict()
    layer = make_layer(dtype=dtype)
    layer.load_state_dict(state)
    for name, tensor in layer.state_dict().items():
        kind = dtype if state[name].is_floating_point() else torch.int64
        assert_same_bits({name: state[name].to(kind)}, {name: tensor})
    layer.load_state_dict(state, assign=True)
    assert_same_bits(state, layer.state_dict())


def test_a_table_in_16_bits_beside_a_router_in_32_comes_back_so(tmp_path):
    layer = make_layer()
    layer.experts.bfloat16()
    save_model(layer, tmp_path / "layer.safetensors")
    loaded = make_layer(device="meta")
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert loaded.experts.weight.dtype == torch.bfloat16
    assert loaded.router.row_keys.dtype == torch.float32
    x = torch.randn(5, 10)
    assert torch.equal(loaded.eval()(x), layer.eval()(x))


# --- strictness ----------------------------------------------------------------------------------

OTHER_OPTIONS = {
    "experts": ({"num_experts": (6, 8)}, r"num_experts=\(6, 8\).*this one .*num_experts=\(8, 6\)"),
    "more experts": ({"num_experts": (9, 6)}, "num_experts=54, .*this one num_experts=48"),
    "heads": ({"heads": 2}, "heads=2, .*this one .*heads=3"),
    "dim_key": ({"dim_key": 4}, "dim_key=4, .*this one .*dim_key=8"),
    "keys": ({"share_keys": False}, "share_keys=False, this one .*share_keys=True"),
    "a gate": ({"glu": True}, "glu=True, this one .*glu=False"),
    "no norm": ({"query_norm": None}, r'Missing key.*"router\.norm\.weight".*running_var"'),
    "a bias": ({"query_bias": True}, r'Unexpected key.*"router\.query\.bias"'),
}


@pytest.mark.parametrize("case", OTHER_OPTIONS)
def test_a_layer_with_other_options_says_which(case):
    options, message = OTHER_OPTIONS[case]
    with pytest.raises(RuntimeError, match="(?s)" + message):
        make_layer().load_state_dict(make_layer(**options).state_dict())


@pytest.mark.parametrize("name", STATES["all at once"][1])
def test_every_tensor_is_missed_and_every_other_noticed(name):
    layer = make_layer(**STATES["all at once"][0])
    state = layer.state_dict()
    state.pop(name)
    if name.endswith("num_batches_tracked"):  # torch adds it to states from before it counted
        assert layer.load_state_dict(dict(state)).missing_keys == []
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{name}"'):
        layer.load_state_dict(state)
    state = layer.state_dict()
    state[name + "2"] = state[name]
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{name}2"'):
        layer.load_state_dict(state)
