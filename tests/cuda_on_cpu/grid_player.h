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

// For a thread that is played: where it stands.
const Place& place();

void wait_for_block();
void wait_for_warp();

// Every lane of the warp contributes `size` bytes, at most 16, and gets those of all of them: lane
// l's at 16·l. They hold until the lane's next exchange but one.
const unsigned char* exchange_in_warp(const void* contribution, size_t size);

}  // namespace peer::test
