"""Untrusted files and tensors raise an exception or give a correct result, and never crash.

One child process runs all cases that could read out of bounds. Its tensors lie between protected
pages, so a read past the end raises a signal. The child writes the name of each case to standard
error before it runs it. If the child dies, the last name is that of the failing case.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import math
import mmap
import os
import random
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peer

ops = torch.ops.peer

N, D, T, P = 30, 9, 4, 6
PLACES = {"first": (0, 0), "last": (T - 1, P - 1)}
BAD_IDS = (-1, N, -N, N + 1, 2**31, 2**32, 2**63 - 1, -(2**63))


# --- tensors between fences, in the child --------------------------------------------------------


def fence(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy whose memory ends (or begins) at a protected page."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    if size == 0:
        return tensor
    body = math.ceil(size / page) * page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    private_and_anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, body + 2 * page, 0, private_and_anonymous, -1, 0) + page
    if libc.mprotect(start, body, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    memory = (ctypes.c_char * size).from_address(start + body - size if at_end else start)
    fenced = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    return fenced.copy_(tensor)


def touch_the_fence(at_end: bool) -> str:
    """The exit status of a process that reads one byte too far."""
    tensor = fence(torch.ones(N, D), at_end)
    bytes_ = tensor.numel() * tensor.element_size()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        ctypes.string_at(tensor.data_ptr() + (bytes_ if at_end else -1), 1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "nothing"


def outcome(call) -> str:
    try:
        result = call()
    except Exception as error:
        return type(error).__name__
    return result if isinstance(result, str) else "returned"


def unless_changed(call, *tensors: Tensor) -> str:
    """The outcome, or "changed" if the call changed the tensors."""
    before = [tensor.clone() for tensor in tensors]
    found = outcome(call)
    same = all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    return found if same else "changed"


class Updated:
    """Fenced arguments of the table update operators, with rows (D) or (parts, D)."""

    def __init__(self, dtype: torch.dtype, at_end: bool, parts: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(1)
        wide = torch.promote_types(dtype, torch.float32)

        def draw(*shape: int) -> Tensor:
            return fence(torch.randn(*shape, generator=generator).to(dtype), at_end)

        def ones(*shape: int, dtype: torch.dtype) -> Tensor:
            return fence(torch.ones(*shape, dtype=dtype), at_end)

        self.table, self.momentum = draw(N, *parts, D), draw(N, *parts, D)
        self.per_part, self.row_steps = ones(N, *parts, dtype=wide), ones(N, dtype=torch.int32)
        self.source, self.coefficients = draw(T, *parts, D), draw(*parts, T, P)
        self.dense = draw(N, *parts, D)

    def written(self):
        return self.table, self.momentum, self.per_part, self.row_steps

    def updates(self):
        return {
            "rowwise_adagrad_": lambda *g: ops.rowwise_adagrad_(
                self.table, self.per_part, *g, lr=0.1, eps=1e-8, weight_decay=0.0
            ),
            "sgd_": lambda *g: ops.sgd_(
                self.table, self.momentum, *g, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0
            ),
            "rowwise_adam_": lambda *g: ops.rowwise_adam_(
                *(self.table, self.momentum, self.per_part, self.row_steps, *g),
                lr=0.1,
                beta1=0.9,
                beta2=0.99,
                eps=1e-8,
                weight_decay=0.0,
            ),
        }

    def fused_updates(self):
        """Functions of what the backward pass of `expert_mlp` takes. The table is in it."""
        return {
            "rowwise_adagrad_": lambda *g: ops.expert_mlp_backward_rowwise_adagrad_(
                *g, self.per_part, lr=0.1, eps=1e-8, weight_decay=0.0
            ),
            "sgd_": lambda *g: ops.expert_mlp_backward_sgd_(
                *g, self.momentum, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0
            ),
            "rowwise_adam_": lambda *g: ops.expert_mlp_backward_rowwise_adam_(
                *(*g, self.momentum, self.per_part, self.row_steps),
                lr=0.1,
                beta1=0.9,
                beta2=0.99,
                eps=1e-8,
                weight_decay=0.0,
            ),
        }

    def gradients(self):
        """Each form of a row gradient as a function of ids (T, P)."""
        return {
            "first rows": lambda ids: (ids[:, 0], self.source, None),
            "last rows": lambda ids: (ids[:, -1], self.source, None),
            "factored": lambda ids: (ids, self.source, self.coefficients),
        }


class Case:
    """Fenced arguments of every operator that takes ids."""

    def __init__(self, dtype: torch.dtype = torch.float32, at_end: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return fence(torch.randn(*shape, generator=generator).to(dtype), at_end)

        self.x, self.weights, self.grad_out = draw(T, D), draw(T, P), draw(T, D)
        self.experts = draw(N, 3, D)
        self.rows = torch.randint(N, (T, P), generator=generator)
        self.rows[0, 0], self.rows[-1, -1] = N - 1, 0  # the rows next to the protected pages
        wide = torch.promote_types(dtype, torch.float32)
        self.hidden, self.gate = (draw(T, P).to(wide) for _ in range(2))
        self.query, self.grad_scores = draw(T, 2, 8), draw(T, 2, P // 2)
        self.row_keys, self.col_keys = draw(5, 4), draw(6, 4)  # 5 * 6 == N
        self.flat, self.parted = Updated(dtype, at_end, ()), Updated(dtype, at_end, (3,))

    def written(self):
        return self.experts, *self.flat.written(), *self.parted.written()

    def calls(self):
        """For each operator, a function of ids (T, P)."""
        return {
            "expert_mlp": lambda ids: ops.expert_mlp(
                self.x, self.weights, ids, self.experts, "gelu"
            ),
            "ExpertPool": self.call_pool,
            "expert_mlp_backward": lambda ids: ops.expert_mlp_backward(
                *(self.grad_out, self.x, self.weights, ids, self.experts),
                *(self.hidden, self.gate, "gelu", False, [True] * 3),
            ),
            "expert_mlp_backward, sparse": lambda ids: ops.expert_mlp_backward(
                *(self.grad_out, self.x, self.weights, ids, self.experts),
                *(self.hidden, self.gate, "gelu", True, [True] * 3),
            ),
            **{
                f"{name}, fused": lambda ids, update=update: update(
                    *(self.grad_out, self.x, self.weights, ids, self.experts),
                    *(self.hidden, self.gate, "gelu"),
                )
                for name, update in self.parted.fused_updates().items()
            },
            "product_key_topk_backward": lambda ids: ops.product_key_topk_backward(
                *(self.grad_scores, self.query, self.row_keys, self.col_keys),
                *(by_head(ids), [True] * 3),
            ),
            **{
                f"{name}, {kind}, {form}": lambda ids, update=update, take=take: update(*take(ids))
                for kind, updated in self.tables().items()
                for name, update in updated.updates().items()
                for form, take in updated.gradients().items()
            },
            "step by a sparse gradient": self.step,
        }

    def tables(self):
        return {"flat": self.flat, "parted": self.parted}

    def call_pool(self, ids):
        pool = peer.ExpertPool(D, num_experts=N, glu=True, device="meta")
        pool.load_state_dict({"weight": self.experts}, assign=True)
        buffer = io.BytesIO()
        torch.save(ids, buffer)
        buffer.seek(0)
        return pool(self.x, self.weights, torch.load(buffer, weights_only=True))

    def step(self, ids):
        table = torch.nn.Parameter(self.parted.table)
        values = self.parted.source.repeat_interleave(P, 0)
        table.grad = torch.sparse_coo_tensor(
            ids.reshape(1, -1), values, table.shape, check_invariants=False
        )
        peer.optim.RowwiseAdagrad([table]).step()


def by_head(ids):
    """Reshapes ids (T, P) to two heads. Other ids are returned unchanged."""
    are_plain = isinstance(ids, Tensor) and ids.layout == torch.strided and not ids.is_nested
    return ids.reshape(T, 2, P // 2) if are_plain and ids.shape == (T, P) else ids


def run_good_ids():
    """Valid ids that read every row and the vectors next to the protected pages."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for at_end in (True, False):
            case = Case(dtype, at_end)
            for name, call in case.calls().items():
                yield f"good ids, {name}, {dtype}, {at_end}", lambda c=call, k=case: c(k.rows)
            for kind, updated in case.tables().items():
                for name, update in updated.updates().items():
                    yield (
                        f"good ids, {name}, {kind}, dense, {dtype}, {at_end}",
                        lambda u=update, g=updated.dense: u(None, g, None),
                    )
            yield (
                f"good ids, product_key_topk, {dtype}, {at_end}",
                lambda k=case: ops.product_key_topk(k.query, k.row_keys, k.col_keys, 7),
            )


def run_bad_ids():
    for at_end in (True, False):
        case = Case(at_end=at_end)
        for name, call in case.calls().items():
            for place, position in PLACES.items():
                if name.endswith("rows") and not name.endswith(f"{place} rows"):
                    continue
                for bad in BAD_IDS:
                    ids = case.rows.clone()
                    ids[position] = bad
                    yield (
                        f"bad ids, {name}, {bad}, {place}, {at_end}",
                        lambda c=call, i=ids, k=case: unless_changed(lambda: c(i), *k.written()),
                    )


def other_dtypes(ids):
    kinds = (torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32, torch.complex64)
    return {str(kind): ids.to(kind) for kind in kinds}


def run_other_dtypes():
    case = Case()
    for name, call in case.calls().items():
        if name == "step by a sparse gradient":
            continue  # torch cannot make a tensor with such ids
        for kind, ids in other_dtypes(case.rows).items():
            yield (
                f"dtypes, {name}, {kind}",
                lambda c=call, i=ids, k=case: unless_changed(lambda: c(i), *k.written()),
            )


def laid_out(ids):
    """The same ids (T, P) with other strides, and their storage if they overlap."""
    wide = torch.full((2 * T, 3 * P), 2**62).mul_(-1)
    wide[::2, ::3] = ids
    line = torch.cat([ids[0], torch.full((P,), 2**62)])
    overlapping = torch.as_strided(line, (T, P), (0, 1))
    sliding = torch.as_strided(ids.flatten(), (T, P), (1, 1))
    return {
        "strided": (wide[::2, ::3], ids),
        "transposed": (ids.T.contiguous().T, ids),
        "flipped twice": (ids.flip(0).flip(0), ids),
        "overlapping": (overlapping, ids[:1].repeat(T, 1)),
        "sliding": (sliding, sliding.clone()),
        "expanded": (ids[0, 0].expand(T, P), ids[0, 0].repeat(T, P)),
    }


def same_result(call, ids, expected_ids) -> str:
    # Two cases, because updates write to their arguments.
    results = []
    for given in (ids, expected_ids):
        case = Case()
        returned = case.calls()[call](given)
        tensors = returned if isinstance(returned, tuple) else (returned,)
        results.append([t.to_dense() for t in tensors if t is not None and t.numel() > 0])
        results[-1] += case.written()
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return "same" if same else "different"


def run_layouts():
    case = Case()
    for name in case.calls():
        for layout, (ids, expected) in laid_out(case.rows).items():
            yield (
                f"layouts, {name}, {layout}",
                lambda n=name, i=ids, e=expected: same_result(n, i, e),
            )


def run_other_forms():
    case = Case()
    forms = {
        "sparse": case.rows.to_sparse(),
        "csr": case.rows.to_sparse_csr(),
        "meta": case.rows.to("meta"),
        "one dimension": case.rows[0],
        "a token less": case.rows[1:],
        "an expert less": case.rows[:, 1:],
        "one dimension more": case.rows[None],
        "no dimension": case.rows[0, 0],
        "none": None,
        "a list": case.rows.tolist(),
        "nested": torch.nested.nested_tensor(list(case.rows)),
    }
    calls = {
        name: call
        for name, call in case.calls().items()
        if not name.endswith("rows") and "step" not in name and name != "ExpertPool"
    }
    for name, call in calls.items():
        for form, ids in forms.items():
            yield (
                f"forms, {name}, {form}",
                lambda c=call, i=ids, k=case: unless_changed(lambda: c(i), *k.written()),
            )


# The other tensors, whose shapes must match the ids.
FORWARD = ("x", "weights", "experts")
BACKWARD = ("grad_out", *FORWARD, "hidden", "gate")
STATE_OF_ADAM = ("table", "momentum", "per_part", "row_steps")
USED = {
    "expert_mlp": FORWARD,
    "ExpertPool": FORWARD,
    "expert_mlp_backward": BACKWARD,
    "rowwise_adagrad_, fused": (*BACKWARD, "parted.per_part"),
    "sgd_, fused": (*BACKWARD, "parted.momentum"),
    "rowwise_adam_, fused": (
        *BACKWARD,
        *("parted.momentum", "parted.per_part", "parted.row_steps"),
    ),
    "product_key_topk_backward": ("grad_scores", "query", "row_keys", "col_keys"),
    **{
        f"{name}, {kind}, {form}": tuple(f"{kind}.{attribute}" for attribute in attributes)
        for kind in ("flat", "parted")
        for name, form, attributes in (
            ("rowwise_adagrad_", "factored", ("table", "per_part", "source", "coefficients")),
            ("sgd_", "factored", ("table", "momentum", "source", "coefficients")),
            ("rowwise_adam_", "factored", (*STATE_OF_ADAM, "source", "coefficients")),
            ("rowwise_adam_", "first rows", (*STATE_OF_ADAM, "source")),
        )
    },
}

OTHER_SHAPES = {
    "shorter": lambda t: t[:-1],
    "longer": lambda t: torch.cat([t, t[:1]]),
    "narrower": lambda t: t[..., :-1],
    "empty": lambda t: t[:0],
    "number": lambda t: t.flatten()[0],
    "flat": lambda t: t.flatten(),
    "of more dimensions": lambda t: t[None],
}

ARE_RIGHT = (
    ("row_keys", "longer"),  # a larger grid
    ("col_keys", "longer"),
    ("flat.per_part", "flat"),
    ("flat.row_steps", "flat"),
    ("parted.row_steps", "flat"),
)


def replace(case: Case, path: str, make) -> None:
    """Replaces the tensor at a path."""
    *owners, name = path.split(".")
    owner = getattr(case, owners[0]) if owners else case
    setattr(owner, name, make(getattr(owner, name)))


def run_wrong_shapes():
    """One tensor with a shape that does not match the others."""
    for name, attributes in USED.items():
        for attribute in attributes:
            for change, make in OTHER_SHAPES.items():
                more_experts = (attribute, change) == ("experts", "longer")
                if (attribute, change) in ARE_RIGHT or (more_experts and name != "ExpertPool"):
                    continue
                case = Case()
                replace(case, attribute, make)
                yield (
                    f"shapes, {name}, {attribute}, {change}",
                    lambda n=name, k=case: unless_changed(
                        lambda: k.calls()[n](k.rows), *k.written()
                    ),
                )


def expand_over_itself(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


def run_overlapping_tables():
    for name in (
        f"rowwise_adam_, {k}, {f}" for k in ("flat", "parted") for f in ("factored", "first rows")
    ):
        for attribute in USED[name][:4]:
            case = Case()
            replace(case, attribute, expand_over_itself)
            call = case.calls()[name]
            yield (
                f"overlaps, {name}, {attribute}",
                lambda c=call, k=case: unless_changed(lambda: c(k.rows), *k.written()),
            )


# --- altered files, in the child -----------------------------------------------------------------


def make_layer(**options):
    sizes = {"num_experts": (8, 6), "heads": 3, "num_experts_per_head": 4, "dim_key": 8}
    return peer.PEER(10, **{**sizes, "glu": True, **options})


def train(layer):
    """Forward, backward and an optimizer step, which read all loaded tensors."""
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer(x).square().sum().backward()
    (table,) = (each for each in layer.parameters() if each.dim() == 3)
    peer.optim.RowwiseAdagrad([table]).step()


def read_state(path, **how):
    layer = make_layer()
    layer.load_state_dict(torch.load(path, weights_only=True, **how))
    train(layer)


def read_state_as_it_is(path):
    layer = make_layer(device="meta")
    layer.load_state_dict(torch.load(path, weights_only=True), assign=True)
    train(layer)


def read_safetensors(path):
    layer = make_layer()
    layer.load_state_dict(load_file(path))
    train(layer)


def read_optimizer(path):
    layer = make_layer()
    optimizer = peer.optim.RowwiseAdam(layer.experts.parameters())
    optimizer.load_state_dict(torch.load(path, weights_only=True))
    layer(torch.randn(5, 10)).square().sum().backward()
    optimizer.step()


def write_files():
    torch.manual_seed(0)
    layer = make_layer()
    torch.save(layer.state_dict(), "layer.pt")
    torch.save(layer.state_dict(), "old.pt", _use_new_zipfile_serialization=False)
    save_file(layer.state_dict(), "layer.safetensors")
    optimizer = peer.optim.RowwiseAdam(layer.experts.parameters())
    layer(torch.randn(5, 10)).square().sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), "optimizer.pt")
    torch.jit.script(layer).save("layer.ts")


READERS = {
    "layer.pt": {
        "read": read_state,
        "mapped": lambda path: read_state(path, mmap=True),
        "assigned": read_state_as_it_is,
    },
    "old.pt": {"read": read_state},
    "layer.safetensors": {"read": read_safetensors},
    "optimizer.pt": {"read": read_optimizer},
    "layer.ts": {"read": lambda path: train(torch.jit.load(path))},
}

# Torch itself validates the program and its sizes. Torch 2.11 still creates tensors that are larger
# than their storage if the archive says so.
ONLY_TRUNCATED = ("layer.ts",)


def run_files():
    write_files()
    for file, readers in READERS.items():
        content = Path(file).read_bytes()
        generator = random.Random(file)
        for way, read in readers.items():
            yield f"whole, {file}, {way}", lambda r=read, f=file: r(f)
        ends = [0, 1, 7, 8, 9, len(content) - 1]
        ends += [generator.randrange(len(content)) for _ in range(14)]
        for end in ends:
            for way, read in readers.items():
                yield (
                    f"truncated, {file}, {way}, {end}",
                    lambda r=read, c=content[:end]: read_from(r, c),
                )
        for i in range(0 if file in ONLY_TRUNCATED else 50):
            altered = alter(content, generator)
            for way, read in readers.items():
                yield f"altered, {file}, {way}, {i}", lambda r=read, c=altered: read_from(r, c)


def alter(content: bytes, generator: random.Random) -> bytes:
    """Changes random bytes, in headers as likely as in tensor data."""
    changed = bytearray(content)
    start = generator.randrange(
        min(2000, len(content)) if generator.random() < 0.5 else len(content)
    )
    for place in range(start, min(start + generator.choice([1, 1, 2, 8]), len(content))):
        changed[place] = generator.choice([0, 0x7F, 0xFF, generator.randrange(256)])
    return bytes(changed)


def read_from(read, content: bytes) -> None:
    # A new file each time, because a mapped file must not change.
    with tempfile.NamedTemporaryFile(dir=".") as file:
        file.write(content)
        file.flush()
        read(file.name)


GROUPS = (
    run_good_ids,
    run_bad_ids,
    run_other_dtypes,
    run_layouts,
    run_other_forms,
    run_wrong_shapes,
    run_overlapping_tables,
    run_files,
)


def run_all() -> dict[str, str]:
    warnings.simplefilter("ignore")
    faulthandler.enable()
    torch.set_num_threads(2)
    found = {"fence, end": touch_the_fence(True), "fence, start": touch_the_fence(False)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for group in GROUPS:
            for name, call in group():
                print(name, file=sys.stderr, flush=True)
                found[name] = outcome(call)
    return found


IN_A_CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_hostile_files
print(json.dumps(test_hostile_files.run_all()))
"""


@pytest.fixture(scope="module")
def outcomes(run_python):
    return run_python(IN_A_CHILD, Path(__file__).parent)


def select(outcomes, group):
    found = {name: each for name, each in outcomes.items() if name.startswith(f"{group}, ")}
    assert len(found) > 1
    return found


def other_than(outcomes, expected):
    return {name: each for name, each in outcomes.items() if each != expected}


# --- ids and what goes with them -----------------------------------------------------------------


def test_a_read_beyond_a_fence_ends_the_process(outcomes):
    assert select(outcomes, "fence") == {"fence, end": "SIGSEGV", "fence, start": "SIGSEGV"}


def test_no_operator_reads_beyond_a_tensor(outcomes):
    assert other_than(select(outcomes, "good ids"), "returned") == {}


def test_ids_out_of_range_are_refused_before_anything_is_written(outcomes):
    assert other_than(select(outcomes, "bad ids"), "IndexError") == {}


def test_ids_of_another_dtype_are_refused(outcomes):
    assert other_than(select(outcomes, "dtypes"), "TypeError") == {}


def test_ids_in_other_strides_are_read_as_what_they_are(outcomes):
    assert other_than(select(outcomes, "layouts"), "same") == {}


@pytest.mark.parametrize("group", ["forms", "shapes"])
def test_what_does_not_fit_is_refused_before_anything_is_written(outcomes, group):
    found = select(outcomes, group)
    assert {n: each for n, each in found.items() if each in ("returned", "changed")} == {}


def test_tables_whose_rows_share_memory_are_not_updated(outcomes):
    assert other_than(select(outcomes, "overlaps"), "ValueError") == {}


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", READERS)
def test_whole_files_are_read_and_truncated_ones_refused(outcomes, file):
    whole = {n: each for n, each in outcomes.items() if n.startswith(f"whole, {file}, ")}
    assert list(whole.values()) == ["returned"] * len(READERS[file])
    truncated = select(outcomes, f"truncated, {file}")
    assert {name: each for name, each in truncated.items() if each == "returned"} == {}


@pytest.mark.parametrize("file", [file for file in READERS if file not in ONLY_TRUNCATED])
def test_altered_files_are_refused_or_read_and_used(outcomes, file):
    # The test is that the child did not crash. This checks that it ran the cases.
    found = list(select(outcomes, f"altered, {file}").values())
    assert len(found) == 50 * len(READERS[file])
    assert 0 < found.count("returned") < len(found)


# --- states that are no layer's ------------------------------------------------------------------

STATES = {
    "a missing table": ("experts.weight", None, r'Missing key.*"experts\.weight"'),
    "a list": ("experts.weight", [[1.0] * 30] * 48, r'"experts\.weight".*<class \'list\'>'),
    "a number": ("router.row_keys", 1.0, r'"router\.row_keys".*<class \'float\'>'),
    "a name": ("router.query.weight", "weight", r'"router\.query\.weight".*<class \'str\'>'),
    "a flat table": ("experts.weight", torch.ones(1440), r"experts\.weight: .*Size\(\[1440\]\)"),
    "a table of one number": ("experts.weight", torch.ones(()), r"experts\.weight: .*Size\(\[\]\)"),
    "a table without parts": (
        "experts.weight",
        torch.ones(48, 30),
        r"experts\.weight: .*Size\(\[48, 30\]\)",
    ),
    "a table without gates": (
        "experts.weight",
        torch.ones(48, 2, 10),
        r"the checkpoint's pool has .*glu=False, this one .*glu=True",
    ),
    "a deeper table": (
        "experts.weight",
        torch.ones(1, 48, 3, 10),
        r"experts\.weight: .*Size\(\[1, 48, 3, 10\]\)",
    ),
    "a flat key": ("router.col_keys", torch.ones(24), r"router\.col_keys: .*Size\(\[24\]\)"),
    "a key of one number": ("router.row_keys", torch.ones(()), r"row_keys: .*Size\(\[\]\)"),
    "keys without a width": (
        "router.row_keys",
        torch.ones(8, 0),
        r"router\.row_keys: .*Size\(\[8, 0\]\)",
    ),
    "a query of one number": (
        "router.query.weight",
        torch.ones(()),
        r"router\.query\.weight: .*Size\(\[\]\)",
    ),
    "statistics of another width": (
        "router.norm.running_var",
        torch.ones(23),
        r"router\.norm\.running_var: .*Size\(\[23\]\)",
    ),
    "another name": ("experts.w_up", torch.ones(1), r'Unexpected key.*"experts\.w_up"'),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("case", STATES)
def test_a_state_that_does_not_fit_is_refused_by_name(case, assign):
    name, value, message = STATES[case]
    state = make_layer().state_dict()
    state.pop(name, None)
    if value is not None:
        state[name] = value
    with pytest.raises(RuntimeError, match="(?s)Error.s. in loading state_dict.*" + message):
        make_layer().load_state_dict(state, assign=assign)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(48, 3, 10).to_sparse(),
        torch.ones(48, 3, 10, dtype=torch.complex64),
        torch.ones(48, 3, 10, dtype=torch.float64),
        torch.ones(48, 3, 10, dtype=torch.int8),
        torch.ones(48, 3, 10, device="meta"),
    ],
    ids=["sparse", "complex", "float64", "int8", "meta"],
)
def test_a_table_that_was_assigned_as_it_came_is_refused_in_use(value):
    layer = make_layer().requires_grad_(False)
    state = layer.state_dict()
    state["experts.weight"] = value
    layer.load_state_dict(state, assign=True)
    with pytest.raises((TypeError, ValueError, RuntimeError), match="peer::expert_mlp"):
        layer(torch.randn(5, 10))


STATES_OF_AN_OPTIMIZER = {
    "a shorter moment": ("first_moment", torch.zeros(47, 2, 10), ValueError),
    "a wider moment": ("first_moment", torch.zeros(48, 2, 11), ValueError),
    "a moment without parts": ("first_moment", torch.zeros(48, 20), ValueError),
    "fewer numbers": ("second_moment", torch.zeros(47, 2), ValueError),
    "a number for both parts": ("second_moment", torch.zeros(48), ValueError),
    "steps of parts": ("row_steps", torch.zeros(48, 2, dtype=torch.int32), ValueError),
    "no steps": ("row_steps", None, KeyError),
    "steps that are none": ("step", "many", TypeError),
}


@pytest.mark.parametrize("case", STATES_OF_AN_OPTIMIZER)
def test_an_optimizers_state_that_does_not_fit_is_refused_in_the_step(case):
    name, value, kind = STATES_OF_AN_OPTIMIZER[case]
    table = torch.nn.Parameter(torch.randn(48, 2, 10))
    optimizer = peer.optim.RowwiseAdam([table])
    table.grad = torch.randn(48, 2, 10)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0] = {**state["state"][0], name: value}
    if value is None:
        del state["state"][0][name]
    optimizer.load_state_dict(state)
    before = table.detach().clone()
    with pytest.raises(kind):
        optimizer.step()
    assert torch.equal(table, before)


STATES_THAT_ARE_CONVERTED = {
    "a moment over itself": ("first_moment", torch.ones(10).expand(48, 2, 10), torch.float32),
    "a number over itself": ("second_moment", torch.ones(1).expand(48, 2), torch.float32),
    "numbers of another dtype": ("second_moment", torch.ones(48, 2).double(), torch.float32),
    "steps of another dtype": ("row_steps", torch.ones(48, dtype=torch.int64), torch.int32),
}


@pytest.mark.parametrize("case", STATES_THAT_ARE_CONVERTED)
def test_an_optimizers_state_is_copied_in_the_dtypes_of_the_optimizer(case):
    name, value, dtype = STATES_THAT_ARE_CONVERTED[case]
    start, gradient = torch.randn(48, 2, 10), torch.randn(48, 2, 10)
    tables = []
    for given in (value, value.to(dtype).contiguous()):
        table = torch.nn.Parameter(start.clone())
        optimizer = peer.optim.RowwiseAdam([table])
        table.grad = gradient
        optimizer.step()
        state = optimizer.state_dict()
        state["state"][0] = {**state["state"][0], name: given}
        optimizer.load_state_dict(state)
        assert optimizer.state[table][name].dtype == dtype
        optimizer.step()
        tables.append(table.detach())
    assert torch.equal(*tables)
