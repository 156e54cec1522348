// Runs a CUDA grid on the CPU, so that kernels can be tested without a GPU and under sanitizers.
//
// Blocks run one after the other. The threads of a block are fibers on one system thread; each runs
// until it waits for others. ThreadSanitizer takes them for threads that only barriers order, so it
// finds every pair of accesses that no barrier orders, whichever fiber runs first.
//
// Stricter than a GPU: every collective takes the whole warp. A thread that returns while others
// wait for it is an error, like any other deadlock. Dynamic shared memory holds garbage when a
// block starts. Under AddressSanitizer, any access beyond the requested bytes is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace peer::test {

struct GridShape {
  unsigned blocks, threads;
  size_t shared_bytes;
};

// The indices of a thread, and the sizes of its block and grid. Both have one dimension.
struct ThreadPlace {
  unsigned thread, block;
  unsigned threads, blocks;
};

// Runs body() for every thread of every block. Rethrows the first exception of a thread. Throws
// std::logic_error on a deadlock.
void play_grid(const GridShape& shape, const std::function<void()>& body);

// The most dynamic shared memory of a block: that of sm_90, unless a test sets a lower limit.
constexpr size_t kSharedBytes = 227 << 10;
size_t shared_bytes_limit();
void limit_shared_bytes(size_t bytes);

// The functions below are called by emulated threads.

const ThreadPlace& thread_place();

void block_barrier();
void warp_barrier();

// Every lane of the warp contributes `size` bytes, at most 16, and gets the bytes of all lanes,
// those of lane l at 16·l. They are valid until the lane's next exchange.
const unsigned char* exchange_in_warp(const void* contribution, size_t size);

// Asynchronous copies. They are made as late as possible, when the thread waits for them. Until
// then the target holds garbage.
void cp_async(void* target, const void* source, size_t size);
void cp_async_commit();
// Waits for all groups but the last ones.
void cp_async_wait(size_t groups_in_flight);

}  // namespace peer::test
