"""Tables on huge pages, and gradients on recycled pages."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import peer

LARGE = 2**23


def huge_page_flags(address: int) -> str:
    """The flags of the mapping that contains an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if not name.endswith(":"):
            first, last = (int(part, 16) for part in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return line
    raise AssertionError(f"no mapping at {address:x}")


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmRSS" in line)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="the system does not describe its mappings"
)


@needs_proc
@pytest.mark.parametrize("make", ["empty_huge", "pool", "dense", "sparse"])
def test_tables_and_their_gradients_ask_for_large_pages(make):
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the system has no large pages")
    if make == "empty_huge":
        tensors = [peer.empty_huge(LARGE)]
    else:
        pool = peer.ExpertPool(64, num_experts=2**16, sparse_grad=make == "sparse")
        tensors = [pool.weight]
        if make != "pool":
            indices = torch.randint(2**16, (512, 64))
            pool(torch.randn(512, 64), torch.rand(512, 64), indices).sum().backward()
            gradient = pool.weight.grad
            tensors = [gradient._values() if gradient.is_sparse else gradient]
    for tensor in tensors:
        assert "hg" in huge_page_flags(tensor.data_ptr()).split()
        assert tensor.data_ptr() % 2**21 == 0


@needs_proc
@pytest.mark.parametrize("make", [peer.empty_huge, peer.zeros_huge])
def test_memory_is_taken_when_it_is_written_and_given_back(make):
    before = resident()
    table = make(64 * 2**20 // 4)
    assert resident() - before < 16 * 2**20
    table.fill_(1)
    assert resident() - before > 60 * 2**20
    del table
    assert resident() - before < 16 * 2**20


def test_more_elements_than_an_int_counts():
    rows, width = 2**19 + 1, 2048
    table = peer.empty_huge(rows, 2, width, dtype=torch.bfloat16)
    assert table.numel() > 2**31
    table[0, 0, 0], table[-1, :, -1] = 3, 5
    assert table.flatten()[0] == 3
    assert table.flatten()[table.numel() - 1] == 5
    weights, indices = torch.ones(1, 1), torch.tensor([[rows - 1]])
    out = peer.functional.expert_mlp(torch.ones(1, width), weights, indices, table, "identity")
    assert out[0, -1] == 25


def test_it_is_like_a_tensor_of_torch():
    table = peer.empty_huge(LARGE // 1024, 1024).fill_(2)
    assert torch.equal(copy.deepcopy(table), table)
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    assert torch.equal(torch.load(file), table)
    table.resize_(2 * LARGE // 1024, 1024)
    assert table[: LARGE // 1024].eq(2).all()
    assert table.share_memory_().is_shared()
    assert table[: LARGE // 1024].eq(2).all()


@pytest.mark.parametrize("size", [(), (0,), (0, 5), (3,), (3, 4), (LARGE,)])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16, torch.int8])
def test_size_and_dtype_are_those_of_torch_empty(size, dtype):
    table, other = peer.empty_huge(*size, dtype=dtype), torch.empty(size, dtype=dtype)
    assert (table.shape, table.dtype, table.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("make", [peer.empty_huge, peer.zeros_huge])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_size_may_be_one_sequence(make, device):
    for size in ((), (3, 4), [3, 4], torch.Size([LARGE, 2])):
        assert make(size, device=device).shape == torch.Size(size)


@pytest.mark.parametrize("size", [(), (0, 5), (300, 4), (LARGE // 1024, 1024)])
def test_zeros_are_zero_although_memory_was_used_before(size):
    for _ in range(3):
        table = peer.zeros_huge(*size, dtype=torch.float64)
        assert table.shape == size
        assert not table.any()
        table.fill_(7)
        del table


def test_default_device_and_modes_are_respected():
    assert peer.empty_huge(LARGE, device="meta").is_meta
    assert peer.zeros_huge(LARGE, device="meta").is_meta
    with torch.device("meta"):
        assert peer.empty_huge(LARGE).is_meta
        assert peer.ExpertPool(8, num_experts=16).weight.is_meta
    with FakeTensorMode():
        assert isinstance(peer.empty_huge(LARGE), FakeTensor)


def test_errors_say_what_is_wrong():
    with pytest.raises(RuntimeError, match="negative"):
        peer.empty_huge(-1, 3)
    with pytest.raises(RuntimeError, match="cannot allocate"):
        peer.empty_huge(2**59)


@needs_proc
def test_a_steps_gradient_uses_the_memory_of_the_last_one():
    pool = peer.ExpertPool(128, num_experts=2**16, sparse_grad=True)
    weights, indices = torch.rand(256, 64), torch.randint(2**16, (256, 64))

    def step() -> int:
        pool.zero_grad()
        pool(torch.randn(256, 128), weights, indices).sum().backward()
        return pool.weight.grad._values().data_ptr()

    first = step()
    assert step() == first
    held = pool.weight.grad
    values = held._values().clone()
    assert step() != first  # that is in use
    assert torch.equal(held._values(), values)


def test_sparse_gradients_can_be_added_to_and_zeroed():
    pool = peer.ExpertPool(128, num_experts=2**14, sparse_grad=True)
    weights, indices = torch.rand(256, 64), torch.randint(2**14, (256, 64))
    x = torch.randn(256, 128)
    for _ in range(2):
        pool(x, weights, indices).sum().backward()
    doubled = pool.weight.grad.to_dense()
    pool.zero_grad()
    pool(x, weights, indices).sum().backward()
    torch.testing.assert_close(doubled, 2 * pool.weight.grad.to_dense())
    pool.zero_grad(set_to_none=False)
    assert pool.weight.grad.to_dense().eq(0).all()


@pytest.mark.parametrize("make", [peer.empty_huge, peer.zeros_huge, torch.empty])
@pytest.mark.parametrize("rows", [0, 3, 1024, 2**15])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_appended_rows_are_zero_and_old_rows_equal(make, rows, dtype):
    table = make((rows, 2, 64), dtype=dtype)
    table.copy_(torch.randint(0, 2, table.shape))
    before = table.clone()
    for _ in range(3):
        larger = peer.memory.append_zero_rows(table, 1000)
        assert larger.shape == (len(table) + 1000, 2, 64)
        assert larger.dtype == dtype
        assert larger.is_contiguous()
        assert torch.equal(larger[:rows], before)
        assert not larger[len(table) :].any()
        assert torch.equal(peer.memory.append_zero_rows(larger, 0), larger)
        table = larger


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux remaps pages")


@on_linux
@pytest.mark.parametrize("is_blocked", [False, True])
def test_views_of_a_table_on_huge_pages_stay_valid(is_blocked):
    table = peer.empty_huge(2048, 1024).normal_()
    # A mapping after the table leaves no room there, so its pages move.
    blocker = mmap_after(table) if is_blocked else None
    address = table.data_ptr()
    view, row = table[5:9], table.detach()[7]
    before = table.clone()
    larger = peer.memory.append_zero_rows(table, 1024)
    assert (larger.data_ptr() != address) >= is_blocked
    assert larger.data_ptr() % 2**21 == 0
    assert torch.equal(table, before)
    assert torch.equal(larger[:2048], before)
    larger[7] = 3
    assert view[2].eq(3).all()
    assert row.eq(3).all()
    row.fill_(4)
    del table, view, row
    gc.collect()
    assert larger[7].eq(4).all()
    assert torch.equal(larger[8:2048], before[8:])
    del blocker


def mmap_after(table: torch.Tensor) -> ctypes.c_void_p:
    """Reserves addresses directly after a tensor, until the process ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    end = table.data_ptr() + table.nbytes
    none, private_anonymous_fixed_noreplace = 0, 0x02 | 0x20 | 0x100000
    return libc.mmap(
        ctypes.c_void_p(end), ctypes.c_size_t(2**21), none, private_anonymous_fixed_noreplace, -1, 0
    )


@on_linux
@needs_proc
def test_appended_rows_ask_for_large_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the system has no large pages")
    table = peer.memory.append_zero_rows(peer.empty_huge(2048, 1024), 2048)
    for row in table[::512]:
        assert "hg" in huge_page_flags(row.data_ptr()).split()


def test_memory_whose_address_is_known_elsewhere_is_copied():
    for table in (peer.empty_huge(2048, 1024), torch.empty(2048, 1024)):
        table.normal_()
        array = table.numpy()
        larger = peer.memory.append_zero_rows(table, 1024)
        assert torch.equal(torch.from_numpy(array), larger[:2048])
        larger.fill_(3)
        assert array.max() != 3


@pytest.mark.parametrize("part", [lambda t: t[8:], lambda t: t[:8], lambda t: t[:, :8]])
def test_a_part_of_a_table_is_copied(part):
    table = peer.empty_huge(2048, 1024).normal_()
    rows = part(table)
    larger = peer.memory.append_zero_rows(rows, 3)
    assert torch.equal(larger[:-3], rows)
    assert larger.data_ptr() != rows.data_ptr()


def test_rows_cannot_be_taken_away():
    with pytest.raises(ValueError, match=r"got shape \[3, 4\] and -1"):
        peer.memory.append_zero_rows(torch.zeros(3, 4), -1)
    with pytest.raises(ValueError, match=r"got shape \[\] and 1"):
        peer.memory.append_zero_rows(torch.zeros(()), 1)
    with pytest.raises(RuntimeError, match=r"allocate|overflow"):
        peer.memory.append_zero_rows(peer.empty_huge(2048, 1024), 2**55)
