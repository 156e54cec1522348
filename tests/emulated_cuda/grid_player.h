// Plays a CUDA grid on the CPU, so that the bodies of the kernels run, under sanitizers too, where
// there is no GPU.
//
// Blocks run one after the other. The threads of a block are fibers on one thread of the system,
// each running until it waits for others; with PEER_PLAY_WITH_THREADS they are threads of the
// system, so that ThreadSanitizer sees every access that no barrier orders.
//
// Stricter than a GPU: warps take part in a collective as a whole, and a thread that returns while
// others wait for it is an error, as is any other deadlock. Dynamic shared memory holds garbage
// when a block starts; under AddressSanitizer nothing beyond the requested bytes may be touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace peer::test {

struct GridShape {
  unsigned blocks, threads;
  size_t shared_bytes;
};

// Where a thread stands, and how many there are of each. Grids and blocks have one dimension.
struct Place {
  unsigned thread, block;
  unsigned threads, blocks;
};

// Runs body() for every thread of every block. Rethrows the first exception that a thread ends
// with; throws std::logic_error where threads wait in vain.
void play_grid(const GridShape& shape, const std::function<void()>& body);

// What a block may have of dynamic shared memory: as much as on sm_90, or less where a test says
// so.
constexpr size_t kSharedBytes = 227 << 10;
size_t shared_bytes_limit();
void limit_shared_bytes(size_t bytes);

// For a thread that is played: where it stands.
const Place& place();

void wait_for_block();
void wait_for_warp();

// Every lane of the warp contributes `size` bytes, at most 16, and gets those of all of them: lane
// l's at 16·l. They hold until the lane's next exchange.
const unsigned char* exchange_in_warp(const void* contribution, size_t size);

// Copies that go on while the thread does. They are made as late as they may be, when it waits for
// them, and until then there is garbage where they go.
void cp_async(void* target, const void* source, size_t size);
void end_batch_of_copies();
// For all batches but the last ones.
void wait_for_copies(size_t batches_left);

}  // namespace peer::test
