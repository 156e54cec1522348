"""Feed-forward blocks of models of torch become PEER layers, and states of such models load."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import peer
from peer._counts import count_peer

SIZES = {"num_experts": (6, 5), "heads": 2, "num_experts_per_head": 3, "dim_key": 4}
CONFIG = peer.PEERConfig(**SIZES, query_norm="rms")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    """Two of four experts per token, and the router's logits, as in Mixtral."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(dim, 4, bias=False)
        self.experts = nn.ModuleList(MLP(dim, 2 * dim) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1).topk(self.top_k)
        every = torch.stack([expert(x) for expert in self.experts], -2)
        picked = every.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, x.shape[-1]))
        return (picked * weights.unsqueeze(-1)).sum(-2), logits


class Residual(nn.Module):
    def __init__(self, dim: int, mlp: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.mlp(self.norm(x))
        return x + (out[0] if isinstance(out, tuple) else out)


def make_model(dim: int = 8) -> nn.Sequential:
    blocks = [MLP(dim, 32), GatedMLP(dim, 24), Mixture(dim)]
    return nn.Sequential(*(Residual(dim, block) for block in blocks))


def make_encoder(**options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        8, nhead=2, dim_feedforward=16, batch_first=True, dropout=0.25, **options
    )
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=not options)


def snapshot(model: nn.Module) -> tuple[list[tuple[str, int]], dict[str, torch.Tensor]]:
    """The modules of a model, by name and identity, and its state."""
    modules = [(name, id(part)) for name, part in model.named_modules()]
    return modules, {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before) -> None:
    modules, state = snapshot(model)
    assert modules == before[0]
    assert list(state) == list(before[1])
    assert all(torch.equal(value, before[1][name]) for name, value in state.items())


class TestConfig:
    def test_its_options_are_those_of_the_layer(self):
        layer = {
            name: parameter.default
            for name, parameter in signature(peer.PEER.__init__).parameters.items()
            if name not in ("self", "dim", "router", "experts", "device", "dtype")
        }
        config = {field.name: field.default for field in fields(peer.PEERConfig)}
        assert config == {"dim": None, **layer, "share_experts": False}

    def test_an_option_out_of_range_is_an_error_at_once(self):
        with pytest.raises(ValueError, match="expected an even dim_key"):
            peer.PEERConfig(dim_key=3)
        with pytest.raises(ValueError, match="expected num_experts to be a perfect square"):
            peer.PEERConfig(num_experts=1000)

    def test_a_layer_has_its_options(self):
        config = peer.PEERConfig(**SIZES, glu=True, scores="sigmoid", dropout=0.5)
        layer = config.make(8, device="meta", dtype=torch.bfloat16)
        assert (layer.router.rows, layer.router.columns) == config.grid == (6, 5)
        assert (layer.experts.glu, layer.router.scores, layer.dropout) == (True, "sigmoid", 0.5)
        assert layer.experts.weight.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="expected dim=16 to be the width of the layer, got 8"):
            peer.PEERConfig(dim=16, **SIZES).make(8)


class TestReplacing:
    def test_every_known_block_becomes_a_layer(self):
        model = make_model()
        table = peer.replace_ffn_(model, CONFIG)
        assert table.names == ["0.mlp", "1.mlp", "2.mlp"]
        assert [entry.before for entry in table] == [
            "MLP",
            "GatedMLP",
            "Mixture: 4 experts, 2 per token",
        ]
        assert isinstance(model[0].mlp, peer.PEER)
        assert isinstance(model[1].mlp, peer.PEER)
        assert isinstance(model[2].mlp, peer.swap.WithMoreOutputs)
        x = torch.randn(2, 5, 8)
        expected = x
        for block, layer in zip(
            model, [model[0].mlp, model[1].mlp, model[2].mlp.peer], strict=True
        ):
            expected = expected + layer(block.norm(expected))
        assert torch.equal(model(x), expected)
        assert model[2].mlp(x)[1] is None

    def test_a_layer_has_dtype_device_and_mode_of_its_block(self):
        model = make_model().to(torch.bfloat16).eval()
        model[1].train()
        model[2].to("meta")
        peer.replace_ffn_(model, CONFIG)
        assert model[0].mlp.experts.weight.dtype == torch.bfloat16
        assert model[0].mlp.router.row_keys.dtype == torch.bfloat16
        assert (model[0].mlp.training, model[1].mlp.training) == (False, True)
        assert not any(part.training for part in model[0].mlp.modules())
        assert model[2].mlp.peer.experts.weight.is_meta
        assert not model[1].mlp.experts.weight.is_meta

    def test_the_filter_gets_block_and_name(self):
        model, seen = make_model(), []
        table = peer.replace_ffn_(
            model, CONFIG, lambda module, name: seen.append((module, name)) or name == "1.mlp"
        )
        blocks = [part for part, _ in seen]
        assert [name for _, name in seen] == ["0.mlp", "1.mlp", "2.mlp"]
        assert [type(block) for block in blocks] == [MLP, GatedMLP, Mixture]
        assert table.names == ["1.mlp"]
        assert isinstance(model[0].mlp, MLP)

    def test_a_block_in_two_places_becomes_one_layer_in_both(self):
        shared = MLP(8, 16)
        model = nn.Sequential(Residual(8, shared), Residual(8, shared))
        assert len(peer.replace_ffn_(model, CONFIG)) == 1
        assert model[0].mlp is model[1].mlp
        assert isinstance(model[0].mlp, peer.PEER)

    def test_a_function_inside_forward_returns_nothing_of_the_mixture(self):
        class Nested(Mixture):
            def forward(self, x: torch.Tensor):
                def pair(value: torch.Tensor):
                    return value, value

                class Unused:
                    def values(self):
                        return 1, 2, 3

                return (lambda value: pair(value)[0])(x)

        model = nn.ModuleDict({"moe": Nested(8)})
        peer.replace_ffn_(model, CONFIG)
        assert isinstance(model["moe"], peer.PEER)

    def test_layers_are_not_replaced_again(self):
        model = make_model()
        peer.replace_ffn_(model, CONFIG, lambda module, name: name != "1.mlp", mode="beside")
        assert peer.replace_ffn_(model, CONFIG).names == ["1.mlp"]

    def test_a_dry_run_gives_the_same_table_and_changes_nothing(self):
        model = make_model()
        before = snapshot(model)
        random = torch.get_rng_state()
        table = peer.replace_ffn_(model, CONFIG, dry_run=True)
        assert_unchanged(model, before)
        assert torch.equal(torch.get_rng_state(), random)
        assert str(peer.replace_ffn_(model, CONFIG)) == str(table)

    def test_a_replaced_model_trains_compiles_and_copies(self):
        model = make_model()
        peer.replace_ffn_(model, CONFIG)
        x = torch.randn(2, 5, 8)
        model(x).square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        torch.compiler.reset()


class TestBeside:
    def test_outputs_and_gradients_do_not_change_by_a_bit(self):
        model = make_model()
        x = torch.randn(2, 5, 8, requires_grad=True)
        expected = model(x)
        (gradient,) = torch.autograd.grad(expected.square().sum(), x)
        table = peer.replace_ffn_(model, CONFIG, mode="beside")
        out = model(x)
        assert torch.equal(out, expected)
        assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], gradient)
        assert [entry.after[:8] for entry in table] == ["block + "] * 3
        assert isinstance(model[2].mlp(x)[1], torch.Tensor)

    def test_the_layers_learn(self):
        model = make_model()
        peer.replace_ffn_(model, CONFIG, mode="beside")
        x = torch.randn(2, 5, 8)
        before = model(x)
        model(x).square().mean().backward()
        with torch.no_grad():
            model[0].mlp.peer.experts.weight -= 0.1 * model[0].mlp.peer.experts.weight.grad
        assert not torch.equal(model(x), before)

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_a_layer_of_torch_keeps_its_bits_in_training_and_evaluation(self, norm_first: bool):
        encoder = make_encoder(norm_first=norm_first)
        replaced = copy.deepcopy(encoder)
        peer.replace_ffn_(replaced, CONFIG, mode="beside")
        x = torch.randn(2, 5, 8)
        for training in (True, False):
            torch.manual_seed(1)
            expected = encoder.train(training)(x)  # with gradients, so without the fused pass
            torch.manual_seed(1)
            assert torch.equal(replaced.train(training)(x), expected)


class BartLayer(nn.Module):
    """A layer with parts of a block, whose dropout is a number, as in BART."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.activation_fn = nn.GELU()
        self.activation_dropout = 0.25

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x, x, x, need_weights=False)[0]
        hidden = F.dropout(self.activation_fn(self.fc1(x)), self.activation_dropout, self.training)
        return x + self.fc2(hidden)


class TestTransformerLayers:
    def test_a_dropout_that_is_a_number_stays_inside_the_block(self):
        layer, x = BartLayer(), torch.randn(2, 5, 8)
        torch.manual_seed(1)
        expected = layer(x)
        beside = copy.deepcopy(layer)
        table = peer.replace_ffn_(beside, CONFIG, mode="beside")
        assert [(e.name, e.before) for e in table] == [("fc1", "BartLayer: fc1, fc2")]
        torch.manual_seed(1)
        assert torch.equal(beside(x), expected)
        peer.replace_ffn_(layer, CONFIG)
        torch.manual_seed(1)
        out = layer(x)
        assert torch.equal(layer(x), out)  # the output of the layer is not dropped

    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("activation", [F.relu, nn.GELU()])
    def test_an_encoder_layer_computes_its_definition(self, norm_first: bool, activation):
        layer = nn.TransformerEncoderLayer(
            8, 2, 16, batch_first=True, activation=activation, norm_first=norm_first
        ).eval()
        holder = nn.ModuleList([layer])
        table = peer.replace_ffn_(holder, CONFIG)
        assert [(e.name, e.before) for e in table] == [
            ("0.linear1", "TransformerEncoderLayer: linear1, linear2")
        ]
        ffn = layer.linear1
        x = torch.randn(3, 5, 8)

        def attend(x):
            return layer.self_attn(x, x, x, need_weights=False)[0]

        if norm_first:
            hidden = x + attend(layer.norm1(x))
            expected = hidden + ffn(layer.norm2(hidden))
        else:
            hidden = layer.norm1(x + attend(x))
            expected = layer.norm2(hidden + ffn(hidden))
        for is_grad_enabled in (False, True):  # torch has a fused pass without gradients
            with torch.set_grad_enabled(is_grad_enabled):
                torch.testing.assert_close(layer(x), expected)

    def test_the_dropout_behind_the_block_stays(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        peer.replace_ffn_(nn.ModuleList([layer]), CONFIG)
        x = torch.randn(2, 5, 8)
        dropped = layer._ff_block(x) == 0
        assert 0 < dropped.sum() < dropped.numel()
        assert (layer.linear1(x) != 0).all()

    def test_a_decoder_layer_computes_its_definition(self):
        layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
        peer.replace_ffn_(nn.ModuleList([layer]), CONFIG)
        x, memory = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
        hidden = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        crossed = layer.multihead_attn(hidden, memory, memory, need_weights=False)[0]
        hidden = layer.norm2(hidden + crossed)
        torch.testing.assert_close(layer(x, memory), layer.norm3(hidden + layer.linear1(hidden)))

    def test_an_encoder_takes_padding_masks_in_evaluation(self):
        encoder = make_encoder().eval()
        peer.replace_ffn_(encoder, CONFIG, lambda module, name: "layers.1" in name)
        x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        with torch.no_grad():
            fast = encoder(x, src_key_padding_mask=padding)
        slow = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(fast[~padding], slow[~padding])


class TestSharedPools:
    CONFIG = peer.PEERConfig(**SIZES, query_norm="rms", share_experts=True)

    def test_all_layers_have_one_pool_and_routers_of_their_own(self):
        model = make_model()
        table = peer.replace_ffn_(model, self.CONFIG)
        layers = [model[0].mlp, model[1].mlp, model[2].mlp.peer]
        assert len({id(layer.experts) for layer in layers}) == 1
        assert len({id(layer.router) for layer in layers}) == 3
        pools = [part for part in model.modules() if isinstance(part, peer.ExpertPool)]
        assert len(pools) == 1
        tables = pools[0].weight.numel()
        assert table[0].counts_after.parameters - table[1].counts_after.parameters == tables
        assert sum("experts.weight" in name for name in model.state_dict()) == 1

    def test_the_pool_moves_trains_and_copies_with_the_model(self):
        model = make_model()
        peer.replace_ffn_(model, self.CONFIG)
        model.double()
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        model(x).sum().backward()
        assert model[1].mlp.experts.weight.grad is not None
        clone = copy.deepcopy(model)
        assert clone[1].mlp.experts is clone[0].mlp.experts
        assert clone[1].mlp.experts is not model[0].mlp.experts
        assert torch.equal(clone(x), model(x))

    def test_the_pool_compiles_and_exports(self):
        model = make_model()
        peer.replace_ffn_(model, self.CONFIG)
        x = torch.randn(2, 5, 8)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
        torch.compiler.reset()

    def test_the_pool_is_saved_once_and_stays_shared(self, tmp_path: Path):
        model = make_model()
        peer.replace_ffn_(model, self.CONFIG)
        peer.save_config(model, tmp_path / "peer.json")
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        fresh = make_model()
        peer.replace_from_config_(fresh, tmp_path / "peer.json")
        fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert fresh[0].mlp.experts is fresh[1].mlp.experts
        x = torch.randn(2, 5, 8)
        assert torch.equal(fresh(x), model(x))

    def test_blocks_of_two_widths_cannot_share(self):
        model = nn.Sequential(make_model(8), make_model(16))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"share_experts=True needs blocks of one width.*16"):
            peer.replace_ffn_(model, self.CONFIG)
        assert_unchanged(model, before)


class TestErrors:
    """Each names what to pass, and nothing is changed."""

    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            (
                {"filter_fn": lambda module, name: False},
                ValueError,
                r"accepts no feed-forward block"
                r"; the blocks of Sequential are '0.mlp', '1.mlp', '2.mlp'",
            ),
            (
                {"filter_fn": lambda module, name: name == "0.norm"},
                ValueError,
                r"accepts '0.norm', no known feed-forward blocks; .*pass PEERConfig\(dim=\.\.\.\)",
            ),
            ({"mode": "instead"}, ValueError, "expected mode to be 'replace' or 'beside'"),
            ({"config": {"heads": 2}}, TypeError, r"expected a peer\.PEERConfig, got dict"),
            (
                {"config": peer.PEERConfig(dim=16, **SIZES)},
                ValueError,
                r"expected blocks of width dim=16, got '0.mlp' \(MLP\) of width 8; leave dim out",
            ),
        ],
    )
    def test_an_argument_that_does_not_fit(self, options, kind, message):
        model = make_model()
        before = snapshot(model)
        with pytest.raises(kind, match=message):
            peer.replace_ffn_(model, **{"config": CONFIG, **options})
        assert_unchanged(model, before)

    def test_an_unknown_architecture(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Bilinear(8, 8, 8))
        with pytest.raises(
            ValueError, match=r"found no feed-forward block in Sequential; pass filt"
        ):
            peer.replace_ffn_(model, CONFIG)

    def test_a_later_block_that_does_not_fit(self):
        model = nn.Sequential(make_model(8), make_model(16))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"'1\.0\.mlp' \(MLP\) of width 16"):
            peer.replace_ffn_(model, peer.PEERConfig(dim=8, **SIZES))
        assert_unchanged(model, before)

    def test_modules_inside_each_other(self):
        model = nn.ModuleDict({"odd": nn.Sequential(nn.Bilinear(8, 8, 8), nn.Tanh())})
        with pytest.raises(
            ValueError, match=r"accepts 'odd' and also 'odd\.0', 'odd\.1' inside it"
        ):
            peer.replace_ffn_(model, peer.PEERConfig(dim=8, **SIZES), lambda module, name: True)

    def test_a_scripted_model(self):
        with pytest.raises(TypeError, match="not scripted"):
            peer.replace_ffn_(torch.jit.script(MLP(8, 16)), CONFIG)

    def test_a_mixture_without_source(self):
        space: dict = {}
        exec("def forward(self, x): return x, x", space)
        mixture = type("Unreadable", (Mixture,), {"forward": space["forward"]})(8)
        with pytest.raises(TypeError, match=r"expected the source of Unreadable\.forward"):
            peer.replace_ffn_(nn.ModuleDict({"moe": mixture}), CONFIG)

    def test_a_mixture_that_does_not_always_return_as_much(self):
        class Sometimes(Mixture):
            def forward(self, x: torch.Tensor):
                if self.training:
                    return x, x
                return x

        with pytest.raises(TypeError, match=r"the same number of things everywhere, got \[1, 2\]"):
            peer.replace_ffn_(nn.ModuleDict({"moe": Sometimes(8)}), CONFIG)


class TestFinding:
    def test_modules_of_unknown_structure_are_replaced_on_request(self):
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(8, 8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x @ self.weight

        model = nn.ModuleDict({"odd": Odd(), "other": Odd()})
        config = peer.PEERConfig(dim=8, **SIZES)
        table = peer.replace_ffn_(model, config, lambda module, name: name == "odd")
        assert table.names == ["odd"]
        assert isinstance(model["odd"], peer.PEER)
        assert isinstance(model["other"], Odd)

    def test_a_norm_of_the_input_is_not_dropped(self):
        model = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))}
        )
        with pytest.raises(ValueError, match="found no feed-forward block"):
            peer.replace_ffn_(model, CONFIG)

    def test_projections_between_other_widths_are_no_block(self):
        mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        with pytest.raises(ValueError, match="found no feed-forward block"):
            peer.replace_ffn_(nn.ModuleDict({"mlp": mlp}), CONFIG)

    def test_projections_of_another_name_are_no_block(self):
        adapter = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
        with pytest.raises(ValueError, match="found no feed-forward block"):
            peer.replace_ffn_(nn.ModuleDict({"adapter": adapter}), CONFIG)

    def test_parts_of_other_widths_are_no_block(self):
        layer = BartLayer()
        layer.fc2 = nn.Linear(16, 4)
        with pytest.raises(ValueError, match="found no feed-forward block"):
            peer.replace_ffn_(nn.ModuleList([layer]), CONFIG)

    def test_a_layer_that_is_used_twice_has_its_block_once(self):
        layer = BartLayer()
        assert len(peer.replace_ffn_(nn.ModuleList([layer, layer]), CONFIG)) == 1

    def test_a_block_that_takes_more_than_tokens_is_no_block(self):
        class WithResidual(MLP):
            def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
                return residual + super().forward(x)

        with pytest.raises(ValueError, match="found no feed-forward block"):
            peer.replace_ffn_(nn.ModuleDict({"mlp": WithResidual(8, 16)}), CONFIG)


class TestTable:
    def test_its_counts_are_those_of_torch(self):
        model = make_model()
        x = torch.randn(5, 8)
        for index, expected in (0, 2 * 2 * 8 * 32), (1, 2 * 3 * 8 * 24):
            with FlopCounterMode(display=False) as counter:
                model[index].mlp(x)
            assert counter.get_total_flops() == 5 * expected
            entry = peer.replace_ffn_(model, CONFIG, dry_run=True)[index]
            assert entry.counts_before.flops == expected
            parameters = sum(p.numel() for p in model[index].mlp.parameters())
            assert entry.counts_before[:2] == (parameters, parameters)

    def test_a_mixture_counts_the_experts_of_a_token(self):
        counts = peer.replace_ffn_(make_model(), CONFIG, dry_run=True)[2].counts_before
        matrices = 2 * 8 * 16
        expert = matrices + 16 + 8
        assert counts == (32 + 4 * expert, 32 + 2 * expert, 2 * (32 + 2 * matrices))

    @pytest.mark.parametrize("glu", [False, True])
    def test_the_counts_of_a_layer_are_those_of_plain_operations(self, glu: bool):
        layer = peer.PEERConfig(**SIZES, glu=glu, query_norm="rms").make(8)
        x = torch.randn(5, 8)
        with FlopCounterMode(display=False) as counter:
            query = layer.router.query(x).unflatten(-1, (2, 2, -1))
            torch.einsum("thd,rd->thr", query[:, :, 0], layer.router.row_keys)
            torch.einsum("thd,cd->thc", query[:, :, 1], layer.router.col_keys)
            layer.router(x)
        routed = counter.get_total_flops() - 2 * 5 * layer.router.query.weight.numel()  # twice
        counts = count_peer(layer)
        experts = 2 * (3 if glu else 2) * 2 * 3 * 8
        selection = 2 * (6 + 5) + 2 * 2 * 3 * 3
        assert counts.flops == routed / 5 + experts + selection
        assert counts.parameters == sum(p.numel() for p in layer.parameters())
        assert counts.active == counts.parameters - layer.experts.weight.numel() + experts // 2

    def test_it_prints_names_layers_and_sums(self):
        table = peer.replace_ffn_(make_model(), CONFIG, dry_run=True)
        lines = str(table).splitlines()
        assert lines[0].split("  ")[0] == "name"
        for word in ("before", "after", "parameters", "active parameters", "FLOPs per token"):
            assert word in lines[0]
        assert len({len(line) for line in lines[1:]}) == 1
        assert lines[3].startswith("1.mlp  GatedMLP")
        assert "PEER: 30 experts, 2 x 3 per token" in lines[3]
        assert "576 -> 574" in lines[3]
        before, after = table.total()
        assert lines[-1].startswith("total")
        assert before.parameters == sum(entry.counts_before.parameters for entry in table)
        assert after.flops == sum(entry.counts_after.flops for entry in table)

    def test_large_counts_have_units(self):
        model = nn.ModuleDict({"mlp": MLP(1024, 4096).to("meta")})
        text = str(peer.replace_ffn_(model, peer.PEERConfig(), dry_run=True))
        assert "1,048,576 experts, 8 x 16 per token" in text
        assert "8.39 M -> 2.15 G" in text
        assert "16.8 M -> " in text


class TestSaving:
    @pytest.mark.parametrize("mode", ["replace", "beside"])
    def test_a_model_is_built_again_from_its_file(self, mode: str, tmp_path: Path):
        model = nn.Sequential(make_model(), make_encoder())
        peer.replace_ffn_(model, CONFIG, lambda module, name: "1" in name, mode=mode)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model.eval()
        peer.save_config(model, tmp_path / "peer.json")
        torch.save(model.state_dict(), tmp_path / "model.pt")
        fresh = nn.Sequential(make_model(), make_encoder()).eval()
        table = peer.replace_from_config_(fresh, tmp_path / "peer.json")
        assert table.names == ["0.1.mlp", "1.layers.0.linear1", "1.layers.1.linear1"]
        fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        x = torch.randn(2, 5, 8)
        assert torch.equal(fresh(x), model(x))
        assert not any(part.training for part in fresh.modules())

    def test_every_option_is_kept(self, tmp_path: Path):
        config = peer.PEERConfig(
            **SIZES,
            activation="relu2",
            glu=True,
            scores="sigmoid",
            query_norm="layer",
            query_bias=True,
            share_keys=False,
            dropout=0.25,
            sparse_grad=True,
            zero_init_out=True,
        )
        model = make_model()
        peer.replace_ffn_(model, config, lambda module, name: name == "0.mlp")
        peer.save_config(model, tmp_path / "peer.json")
        fresh = make_model()
        peer.replace_from_config_(fresh, tmp_path / "peer.json")
        assert repr(fresh) == repr(model)
        assert fresh[0].mlp.experts.zero_init_out
        assert fresh[0].mlp.experts.num_experts_per_token == 6

    def test_growth_masks_and_folding_are_kept(self, tmp_path: Path):
        config = peer.PEERConfig(**SIZES)
        model = make_model()
        peer.replace_ffn_(model, config, lambda module, name: "2" not in name)
        model[0].mlp.grow(2)
        model[0].mlp.freeze_experts([1, 7])
        model[0].mlp.disable_experts([3])
        model[1].mlp.freeze_experts()
        model.eval()
        peer.save_config(model, tmp_path / "peer.json")
        fresh = make_model().eval()
        peer.replace_from_config_(fresh, tmp_path / "peer.json")
        fresh.load_state_dict(model.state_dict())
        x = torch.randn(2, 5, 8)
        assert torch.equal(fresh(x), model(x))
        assert fresh[0].mlp.experts.frozen.nonzero().flatten().tolist() == [1, 7]
        assert not fresh[1].mlp.router.query.weight.requires_grad
        peer.fold_query_norm_(model)
        peer.save_config(model, tmp_path / "peer.json")
        fresh = make_model().eval()
        peer.replace_from_config_(fresh, tmp_path / "peer.json")
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), model(x))

    def test_errors_name_what_is_wrong(self, tmp_path: Path):
        model = make_model()
        with pytest.raises(ValueError, match="expected a model with a PEER layer, got Sequential"):
            peer.save_config(model, tmp_path / "peer.json")
        peer.replace_ffn_(model, CONFIG)
        peer.save_config(model, tmp_path / "peer.json")
        for other, message in (
            (make_model()[:2], r"expected a feed-forward block at '2\.mlp', but Sequential has no"),
            (make_model(16), r"expected a block of width 8 at '0\.mlp', got MLP of width 16"),
        ):
            before = snapshot(other)
            with pytest.raises(ValueError, match=message):
                peer.replace_from_config_(other, tmp_path / "peer.json")
            assert_unchanged(other, before)
        content = json.loads((tmp_path / "peer.json").read_text())
        with pytest.raises(ValueError, match="of version 1, got version 2"):
            peer.replace_from_config_(make_model(), {**content, "version": 2})

    def test_a_replaced_model_pickles(self):
        model = make_model()
        peer.replace_ffn_(model, CONFIG, mode="beside")
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        x = torch.randn(2, 5, 8)
        assert torch.equal(torch.load(stream, weights_only=False)(x), model(x))
