"""Which text makes experts fire, which experts a text uses, and what changed in a model."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peer
from peer.inspect import changes, distances, experts_of, top_tokens
from peer.reference import ACTIVATIONS

SIZES = {"num_experts": (5, 6), "heads": 2, "num_experts_per_head": 4, "dim_key": 8}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def decode(ids):
    return "".join(LETTERS[i] for i in ids)


class Model(nn.Module):
    """Letters to vectors, and two layers, the second of which is called `last`."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(26, 10)
        self.first = peer.PEER(10, **{**SIZES, **options})
        self.last = peer.PEER(10, **{**SIZES, "num_experts": (4, 6), **options})
        self.eval()

    def forward(self, ids, mask=None):
        return self.last(self.first(self.embedding(ids), mask), mask)


def firing(layer, x):
    """For each token of x (T, D), what each retrieved expert does, one retrieval at a time."""
    weights, indices = layer.router(x)
    down, *gate, up = layer.experts.weight.unbind(1)
    found = []
    for token, (one, other) in enumerate(
        zip(weights.flatten(1).tolist(), indices.flatten(1).tolist(), strict=True)
    ):
        total = {}
        for weight, expert in zip(one, other, strict=True):
            total[expert] = total.get(expert, 0.0) + weight
        for expert, weight in total.items():
            neuron = ACTIVATIONS[layer.experts.activation](x[token] @ down[expert])
            if gate:
                neuron = neuron * (x[token] @ gate[0][expert])
            found.append((token, expert, weight, float(weight * neuron * up[expert].norm())))
    return found


with_and_without_gate = pytest.mark.parametrize(
    "options", [{}, {"glu": True, "activation": "silu"}], ids=["plain", "glu"]
)


@with_and_without_gate
def test_top_tokens_are_those_of_the_largest_strength(options):
    model = Model(**options)
    ids = torch.randperm(26).view(2, 13)  # every letter once, so all windows differ
    found = top_tokens(model, [ids], {"first": [3, 7, 29]}, decode=decode, per_expert=4, context=3)
    assert list(found) == ["first"]
    with torch.no_grad():
        all_ = firing(model.first, model.embedding(ids.flatten()))
    for expert, tokens in found["first"].items():
        expected = sorted((e for e in all_ if e[1] == expert), key=lambda e: -abs(e[3]))[:4]
        assert [t["sequence"] * 13 + t["position"] for t in tokens] == [e[0] for e in expected]
        for token, (place, _, weight, strength) in zip(tokens, expected, strict=True):
            assert token["weight"] == pytest.approx(weight, rel=1e-4)
            assert token["strength"] == pytest.approx(strength, rel=1e-4, abs=1e-7)
            row, column = divmod(place, 13)
            text = decode(ids[row].tolist())
            assert token["token"] == text[column]
            assert token["before"] == text[max(column - 3, 0) : column]
            assert token["after"] == text[column + 1 : column + 4]
            assert token["id"] == ids[row, column]
            assert token["batch"] == 0
    assert sum(map(len, found["first"].values())) > 3
    json.dumps(found)


def test_batches_are_joined_and_the_strongest_kept():
    model = Model()
    batches = [torch.randperm(26)[:20].view(2, 10) for _ in range(4)]
    options = {"decode": decode, "per_expert": 20, "context": 9}
    found = top_tokens(model, batches, {"last": range(24)}, **options)["last"]
    whole = top_tokens(model, [torch.cat(batches)], {"last": range(24)}, **options)["last"]
    assert sorted(found) == list(range(24))
    for expert in found:  # equal letters are equally strong
        one, other = ([t["strength"] for t in tokens[expert]] for tokens in (found, whole))
        assert one == pytest.approx(other, rel=1e-4)
    assert {t["batch"] for tokens in found.values() for t in tokens} == {0, 1, 2, 3}


def test_the_same_text_is_listed_once():
    model, ids = Model(), torch.randint(26, (1, 10))
    once = top_tokens(model, [ids], {"first": range(30)})
    assert top_tokens(model, [ids, ids.expand(3, -1)], {"first": range(30)}) == once


def test_of_equal_texts_the_one_that_fires_most_strongly_is_listed():
    model, ids = Model(), torch.arange(10)[None]
    model.forward = lambda ids, scale: model.first(scale * model.embedding(ids))
    calls = [(ids, torch.tensor(scale)) for scale in (1.0, 3.0, 2.0)]
    both, *each = (
        top_tokens(model, data, {"first": range(30)}, per_expert=10, decode=decode)["first"]
        for data in (calls, *([call] for call in calls))
    )
    later = 0
    for expert, tokens in both.items():
        for found in tokens:
            same = [t for one in each for t in one[expert] if t["position"] == found["position"]]
            assert abs(found["strength"]) == max(abs(t["strength"]) for t in same)
            later += found["batch"] > 0
    assert later > 0


def test_padding_neither_fires_nor_is_text():
    model, ids = Model(), torch.randint(26, (3, 8))
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, :2] = mask[1, 5:] = True
    ids[mask] = 25
    ids[~mask] %= 25
    batch = {"ids": ids, "mask": mask}
    tokens = [
        token
        for found in top_tokens(model, [batch], {"first": range(30)}, decode=decode).values()
        for tokens in found.values()
        for token in tokens
    ]
    assert tokens
    assert not any("z" in t["before"] + t["token"] + t["after"] for t in tokens)
    used = experts_of(model, batch, decode=decode)["first"]
    assert len(used["tokens"]) == int((~mask).sum())
    assert not any(token["token"] == "z" for token in used["tokens"])
    assert all(math.isfinite(each["strength"]) for each in used["experts"])


def test_a_token_that_is_not_finite_does_not_fire():
    model, ids = Model(), torch.arange(26)[None]
    with torch.no_grad():
        model.embedding.weight[7] = float("nan")
    found = top_tokens(model, [ids], {"first": range(30)}, per_expert=30)["first"]
    tokens = [token for tokens in found.values() for token in tokens]
    assert {token["id"] for token in tokens} == set(range(26)) - {7}
    assert all(math.isfinite(token["strength"]) for token in tokens)
    used = experts_of(model, ids)["first"]["experts"]
    assert all(math.isfinite(each["strength"] + each["weight"]) for each in used)


@with_and_without_gate
def test_experts_of_a_text_are_all_that_it_retrieves(options):
    model, text = Model(**options), torch.randint(26, (12,))
    found = experts_of(model, text, decode=decode, per_token=3)
    assert list(found) == ["first", "last"]
    with torch.no_grad():
        expected = firing(model.first, model.embedding(text))
    tokens, experts = found["first"]["tokens"], found["first"]["experts"]
    assert "".join(token["token"] for token in tokens) == decode(text.tolist())
    for place, token in enumerate(tokens):
        own = sorted((e for e in expected if e[0] == place), key=lambda e: -abs(e[3]))[:3]
        assert [each["expert"] for each in token["experts"]] == [e[1] for e in own]
        for each, (_, _, weight, strength) in zip(token["experts"], own, strict=True):
            assert each["weight"] == pytest.approx(weight, rel=1e-4)
            assert each["strength"] == pytest.approx(strength, rel=1e-4, abs=1e-7)
    assert {each["expert"]: each["tokens"] for each in experts} == {
        expert: sum(e[1] == expert for e in expected) for expert in {e[1] for e in expected}
    }
    strengths = [each["strength"] for each in experts]
    assert strengths == sorted(strengths, reverse=True)
    assert experts_of(model, text.tolist(), decode=decode, per_token=3) == found
    assert experts_of(model, text[None], decode=decode, per_token=3) == found
    json.dumps(found)


def test_inspection_can_stop_after_some_tokens():
    model, text = Model(), torch.randint(26, (12,))
    found = experts_of(model, text, max_tokens=5)["first"]
    assert found["tokens"] == experts_of(model, text)["first"]["tokens"][:5]


def test_without_a_decoder_the_text_is_the_ids():
    tokens = experts_of(Model(), [7, 4, 11])["first"]["tokens"]
    assert [token["token"] for token in tokens] == ["7", "4", "11"]


def test_layers_that_flatten_their_tokens_are_inspected():
    class Flat(Model):
        def forward(self, ids):
            return super().forward(ids.flatten())

    model = Flat()
    ids = torch.randint(26, (3, 8))
    plain = Model()
    plain.load_state_dict(model.state_dict())
    assert top_tokens(model, [ids], {"first": [1]}) == top_tokens(plain, [ids], {"first": [1]})


def test_inspection_leaves_the_model_as_it_was():
    model = Model().train()
    before = copy.deepcopy(model.state_dict())
    with peer.UsageTracker(model) as tracker:
        observers = model.first.router.observers
        top_tokens(model, [torch.randint(26, (2, 6))], {"first": [1]})
        assert model.first.router.observers == observers
    assert tracker.layers["first"].counts.sum() == 2 * 6 * 8
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(IndexError):
        top_tokens(model, [torch.full((2, 6), 26)], {"first": [1]})
    assert all(part.training for part in model.modules())
    assert model.first.router.observers == ()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: top_tokens(m, [x], [1]), ValueError, r"several layers: \['first', 'last'\]"),
        (lambda m, x: top_tokens(m, [x], {"middle": [1]}), ValueError, r"names \['middle'\]"),
        (lambda m, x: top_tokens(m, [x], {"first": []}), ValueError, "ids of experts .* got none"),
        (lambda m, x: top_tokens(m, [x], {"first": [30]}), IndexError, r"\[0, 30\), got 30"),
        (
            lambda m, x: top_tokens(m, [x], {"first": [1]}, token_ids=lambda b: b[:, 1:]),
            ValueError,
            r"shape \[2, 6\], as the tokens of the layer 'first', got \[2, 5\]",
        ),
        (lambda m, x: top_tokens(m[1], [x.float()], [1]), ValueError, "no tensor of integers"),
        (lambda m, x: top_tokens(nn.Linear(2, 2), [x], [1]), ValueError, "with a PEER layer"),
        (lambda m, x: experts_of(nn.Linear(2, 2), [1, 2]), ValueError, "with a PEER layer"),
    ],
)
def test_wrong_arguments_are_errors(call, error, message):
    class Both(Model):
        def __getitem__(self, _):
            return nn.Sequential(nn.Linear(6, 10), self.first)

    with pytest.raises(error, match=message):
        call(Both(), torch.randint(26, (2, 6)))


class LargestAllocation(TorchDispatchMode):
    """Notes the bytes of the largest memory that an operator allocates."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        given = {
            each.untyped_storage().data_ptr()
            for each in tree_leaves((arguments, keywords))
            if isinstance(each, torch.Tensor)
        }
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage.data_ptr() not in given:
                    self.bytes = max(self.bytes, storage.nbytes())
        return result


def test_top_tokens_need_less_than_a_byte_for_each_expert():
    model = Model(num_experts=(250, 1000))
    with LargestAllocation() as largest:
        top_tokens(model, [torch.randint(26, (2, 6))], {"first": [1, 5]})
    assert 0 < largest.bytes < 250_000
    with LargestAllocation() as largest:
        model.first.experts.weight.abs()
    assert largest.bytes == 250_000 * 20 * 4


# ---- Changes.


def test_distances_are_those_of_the_rows():
    model = Model()
    before = copy.deepcopy(model.state_dict())
    old = model.first.experts.weight.detach().clone()
    with torch.no_grad():
        model.first.experts.weight[3] *= 1.5
        model.first.experts.weight[4, 1, 2] += 1.0
    model.first.grow(2)
    moved = distances(model, before)
    assert list(moved) == ["first.experts", "last.experts"]
    expected = torch.zeros(30, dtype=torch.float64)
    expected[3] = 0.5
    expected[4] = 1.0 / old[4].norm()
    torch.testing.assert_close(moved["first.experts"][:30], expected, rtol=1e-5, atol=0)
    assert moved["first.experts"][30:].isnan().all()
    assert (moved["last.experts"] == 0).all()


def test_a_row_of_keys_has_moved_if_the_key_of_one_head_has():
    layer = peer.PEER(10, **SIZES, share_keys=False)
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer.router.row_keys[1, 3, 0] += 1.0
        layer.router.row_keys[:, 4] += 1.0
        layer.router.col_keys[0, 2] += 1.0
    found = changes(layer, before)[""]
    assert (found["row_keys_moved"], found["column_keys_moved"]) == (2, 1)


def test_changes_are_counted():
    model = Model()
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.first.experts.weight[3] *= 1.5
        model.first.experts.weight[4] *= 3.0
        model.first.router.row_keys[2] += 1.0
    model.first.grow(2)
    found = changes(model, before, largest=3)["first"]
    assert found["largest"][0] == {"expert": 4, "distance": pytest.approx(2.0)}
    assert found["largest"][1] == {"expert": 3, "distance": pytest.approx(0.5)}
    assert {key: found[key] for key in found if key != "largest"} == {
        "experts": 42,
        "grown": 12,
        "moved": 2,
        "unmoved": 28,
        "mean": pytest.approx(2.5 / 30),
        "max": pytest.approx(2.0),
        "row_keys_moved": 1,
        "column_keys_moved": 0,
    }
    assert changes(model, before.state_dict(), largest=3)["first"] == found
    json.dumps(found)


def test_a_state_that_is_no_earlier_one_is_an_error():
    model = Model()
    with pytest.raises(ValueError, match=r"no tensor first.experts.weight"):
        changes(model, {})
    state = model.state_dict()
    later = copy.deepcopy(model)
    later.first.grow(1)
    with pytest.raises(ValueError, match=r"no earlier one.*\[30, 2, 10\], and in the state \[36"):
        changes(model, later.state_dict())
    with pytest.raises(ValueError, match="no earlier one"):
        distances(Model(glu=True), state)
