"""Peak memory: the memory of a pass beyond its inputs and results, measured in a new process.

A step runs once at a small size, which starts threads and initialises autograd, and then at full
size. Afterwards temporaries are freed and results exist, so the peak minus the resident memory is
the temporary memory of the step. MALLOC_MMAP_THRESHOLD_ makes malloc map large blocks separately,
so freed memory is not resident.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

MIB = 2**20

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists() or "VmHWM" not in Path("/proc/self/status").read_text(),
    reason="the system does not tell a process its peak memory",
)

MEASURE = """
import gc, json, sys, torch, peer
from pathlib import Path

torch.set_num_threads(2)
torch.manual_seed(0)

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if field in l)
    return int(line.split()[1]) * 1024

def measure(make, *sizes):
    step = make(*(8 for _ in sizes))
    step()
    step = make(*sizes)
    kept = step()
    gc.collect()
    print(json.dumps({"extra": status("VmHWM") - status("VmRSS")}))

# For a step that leaves nothing: beyond what was resident before it. Pages of freed gradients stay,
# for the next ones.
def measure_growth(make, *sizes):
    make(*(8 for _ in sizes))()
    step = make(*sizes)
    before = status("VmRSS")
    step()
    print(json.dumps({"extra": status("VmHWM") - before}))
"""

LAYER = """
def make(tokens, root):
    layer = peer.PEER(256, num_experts=max(root, 16) ** 2, sparse_grad=sys.argv[1] == "sparse")
    x = torch.randn(tokens, 256, requires_grad=True)
    def step():
        layer(x).square().mean().backward()
        return x.grad
    return step

measure(make, 2048, 1024)
"""

EXPERTS = """
def make(tokens, per_token, experts, dim):
    x = torch.randn(tokens, dim, requires_grad=True)
    weights = torch.rand(tokens, per_token, requires_grad=True)
    indices = torch.randint(experts, (tokens, per_token))
    table = torch.randn(experts, 3, dim).requires_grad_()
    def step():
        sparse = sys.argv[1] == "sparse"
        out = torch.ops.peer.expert_mlp(x, weights, indices, table, "gelu", sparse)[0]
        out.sum().backward()
    return step

measure(make, *map(int, sys.argv[2:]))
"""

LITTLE_ROOM = """
# Pages that nobody writes are not resident, so a buffer of zeros would not show in the peak. Here
# the address space has no room for one: a dense gradient of the table is 256 MiB.
import resource

def make(experts):
    table = torch.randn(experts, 2, 32).requires_grad_()
    def step(sparse_grad):
        x, weights = torch.randn(16, 32), torch.rand(16, 8)
        indices = torch.randint(experts, (16, 8))
        out = torch.ops.peer.expert_mlp(x, weights, indices, table, "gelu", sparse_grad)[0]
        torch.autograd.grad(out.sum(), table)
    return step

for sparse_grad in (True, False):
    make(8)(sparse_grad)
step = make(2**20)
limit = status("VmSize") + 192 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def fits(sparse_grad):
    try:
        step(sparse_grad)
    except RuntimeError as error:
        assert "memory" in str(error)
        return False
    return True

print(json.dumps({"sparse": fits(True), "dense": fits(False)}))
"""

UPDATE = """
def make(tokens, experts):
    pool = peer.ExpertPool(256, num_experts=max(experts, 16), sparse_grad=True)
    x = torch.randn(tokens, 256)
    weights, indices = torch.rand(tokens, 128), torch.randint(max(experts, 16), (tokens, 128))
    optimizer = peer.optim.RowwiseAdagrad(pool.parameters())
    if sys.argv[1] == "fused":
        optimizer.fuse_into_backward(pool)
    def step():
        pool(x, weights, indices).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step

measure_growth(make, 1024, 2**17)
"""

RETRIEVAL = """
def make(tokens, heads, keys):
    query = torch.randn(tokens, heads, 256, requires_grad=True)
    row_keys, col_keys = (torch.randn(keys, 128, requires_grad=True) for _ in range(2))
    def step():
        scores, indices = torch.ops.peer.product_key_topk(query, row_keys, col_keys, 16)
        scores.sum().backward()
    return step

measure(make, 2048, 8, 1024)
"""


@pytest.fixture
def peak(run_python):
    def measure(snippet: str, *arguments: object) -> int:
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        return run_python(MEASURE + snippet, *arguments, environment=environment)["extra"]

    return measure


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
@pytest.mark.long
def test_the_layer_of_a_million_experts_needs_less_than_128_mib_beyond_its_gradients(
    peak, gradients
):
    extra = peak(LAYER, gradients)
    assert extra < 128 * MIB
    assert extra > 16 * MIB, "the queries alone take 16 MiB: nothing was measured"


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
@pytest.mark.long
def test_experts_keep_nothing_of_size_tokens_times_experts_per_token_times_dim(peak, gradients):
    # 2048 · 128 · 256 floats are 256 MiB. With 500 experts, the table's gradient is small.
    extra = peak(EXPERTS, gradients, 2048, 128, 500, 256)
    assert extra < 48 * MIB
    assert extra > MIB, "the pre-activations alone take 1 MiB: nothing was measured"


@pytest.mark.long
def test_sparse_gradients_make_no_dense_buffer(run_python):
    room = run_python(MEASURE + LITTLE_ROOM)
    assert room == {"sparse": True, "dense": False}


@pytest.mark.long
def test_a_fused_update_makes_no_gradient_of_the_table(peak):
    # 2^17 draws of 2^17 experts retrieve 63 % of them: the gradient is 162 MiB.
    assert peak(UPDATE, "fused") < 32 * MIB
    assert peak(UPDATE, "step") > 128 * MIB, "otherwise the limit means nothing"


@pytest.mark.long
def test_retrieval_keeps_no_sub_scores(peak):
    # 2048 · 8 · 2 · 1024 floats are 128 MiB.
    extra = peak(RETRIEVAL)
    assert extra < 64 * MIB
    assert extra > MIB, "the indices alone take 2 MiB: nothing was measured"


GROWTH = """
# A pool of 256 MiB and its momentum, of which 8 rows were written, grow by a tenth.
pool = peer.ExpertPool(256, num_experts=2**17, sparse_grad=True)
if sys.argv[1] == "malloc":
    pool.weight.data = torch.empty(0)
    pool.weight.data = torch.empty(2**17, 2, 256).fill_(1)
optimizer = peer.optim.SGD(pool.parameters(), lr=0.1, momentum=0.9)
pool(torch.randn(4, 256), torch.rand(4, 2), torch.arange(8).view(4, 2)).sum().backward()
optimizer.step()
pool.zero_grad()
before = status("VmRSS")
pool.grow(2**17 // 10)
peer.optim.grow_(optimizer)
print(json.dumps({"extra": status("VmHWM") - before}))
"""


def test_growth_by_a_tenth_takes_the_memory_of_a_tenth(run_python):
    # The new rows are 26 MiB. Their momentum is not written.
    assert run_python(MEASURE + GROWTH, "huge pages")["extra"] < 40 * MIB
    if sys.platform == "linux":
        assert run_python(MEASURE + GROWTH, "malloc")["extra"] > 240 * MIB
