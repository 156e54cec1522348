#include "grid_player.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// This file is not instrumented for ThreadSanitizer, because fibers share the scheduler's state
// without synchronisation. The definition tells that the kernels are.
#ifdef PEER_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

alignas(16) unsigned char peer_shared_memory[peer::test::kSharedBytes];

namespace peer::test {

namespace {

constexpr unsigned kWarp = 32;
constexpr int kGarbage = 0xff;  // the bytes of memory before the first write: NaN

// An order of accesses, for ThreadSanitizer: what a fiber did before it releases happens before
// what another does after it acquires. Nothing else orders accesses of two fibers of a block.
struct Order {
  char address = 0;

#ifdef PEER_THREAD_SANITIZER
  void release() { __tsan_release(&address); }
  void acquire() { __tsan_acquire(&address); }
#else
  void release() {}
  void acquire() {}
#endif
};

// A reusable barrier. The lanes of a warp exchange values through two alternating buffers, so that
// a lane's next contribution does not overwrite values that others still read.
struct Barrier {
  unsigned members = 0;
  unsigned arrived = 0;
  unsigned round = 0;
  // Of even and odd rounds. A fiber may arrive for the next round before others have left this one,
  // but not for the round after the next.
  Order orders[2];
  alignas(16) unsigned char contributions[2][kWarp][16];
};

struct Copy {
  void* target;
  const void* source;
  size_t size;
  size_t group;
};

// An emulated thread.
struct Player {
  ThreadPlace place;
  Barrier* warp = nullptr;
  unsigned exchanges = 0;
  std::vector<Copy> copies;  // pending
  size_t groups = 0;         // of copies, committed
};

thread_local Player* current = nullptr;

size_t shared_limit = kSharedBytes;

void prepare_shared_memory(size_t bytes) {
  if (bytes > shared_limit) {
    throw std::logic_error("a block asks for " + std::to_string(bytes) +
                           " bytes of shared memory, more than the device has");
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(peer_shared_memory, kSharedBytes);
#endif
  std::memset(peer_shared_memory, kGarbage, kSharedBytes);
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(peer_shared_memory + bytes, kSharedBytes - bytes);
#endif
}

// The threads of one block and their barriers.
struct Block {
  explicit Block(const GridShape& shape) : players(shape.threads), warps(shape.threads / kWarp) {
    if (shape.threads % kWarp != 0) {
      throw std::logic_error("a block of " + std::to_string(shape.threads) +
                             " threads is no multiple of the warp size");
    }
    whole.members = shape.threads;
    for (Barrier& warp : warps) {
      warp.members = kWarp;
    }
    for (unsigned t = 0; t < shape.threads; ++t) {
      players[t].place = {t, 0, shape.threads, shape.blocks};
      players[t].warp = &warps[t / kWarp];
    }
  }

  void begin(unsigned block, size_t shared_bytes) {
    prepare_shared_memory(shared_bytes);
    for (Player& player : players) {
      player.place.block = block;
      player.copies.clear();
    }
    begins.release();
  }

  std::vector<Player> players;
  Barrier whole;
  std::vector<Barrier> warps;
  Order begins, ends;
  std::exception_ptr failure;
};

Block* current_block = nullptr;

// The point at which a fiber or the scheduler continues. ucontext makes the stack of a fiber. Later
// switches use the compiler's setjmp, which makes no system call. Sanitizers intercept the C
// library's functions: at every swapcontext, AddressSanitizer would forget what it knows about the
// whole stack.
struct Continuation {
  ucontext_t context;
  void* jump[5];
  bool has_run = false;
};

[[noreturn]] __attribute__((noinline, no_sanitize("address"))) void resume(Continuation& to) {
  if (to.has_run) {
    __builtin_longjmp(to.jump, 1);
  }
  setcontext(&to.context);
  std::abort();
}

__attribute__((noinline, no_sanitize("address"))) void switch_context(Continuation& from,
                                                                      Continuation& to) {
  if (__builtin_setjmp(from.jump) == 0) {
    from.has_run = true;
    resume(to);
  }
}

// A thread of a block, with a stack of its own. It runs the same thread of one block after the
// other.
struct Fiber {
  static constexpr size_t kStackBytes = 256 << 10;

  Fiber();
  ~Fiber();

  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  Continuation continuation;
  bool has_returned = false;
  const Barrier* barrier = nullptr;  // at which it waits until the round is complete
  unsigned round = 0;
  void* sanitizer_fiber = nullptr;  // ThreadSanitizer's

  bool is_waiting() const { return barrier != nullptr && barrier->round == round; }
};

struct Scheduler {
  Continuation continuation;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  unsigned steps = 0;  // of all fibers; a pass over them without a step is a deadlock
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer_fiber = nullptr;
};

Scheduler scheduler;

// AddressSanitizer must know that the stack changes, and ThreadSanitizer that another fiber runs.
void before_switch([[maybe_unused]] void** fake_stack,
                   [[maybe_unused]] const void* stack,
                   [[maybe_unused]] size_t bytes,
                   [[maybe_unused]] void* sanitizer_fiber) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
#ifdef PEER_THREAD_SANITIZER
  __tsan_switch_to_fiber(sanitizer_fiber, __tsan_switch_to_fiber_no_sync);
#endif
}

void after_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] bool from_scheduler) {
#ifdef __SANITIZE_ADDRESS__
  const void** stack = from_scheduler ? &scheduler.stack : nullptr;
  __sanitizer_finish_switch_fiber(fake_stack, stack,
                                  from_scheduler ? &scheduler.stack_bytes : nullptr);
#endif
}

void run_until_waiting(Fiber& fiber) {
  scheduler.running = &fiber;
  void* fake_stack = nullptr;
  before_switch(&fake_stack, fiber.stack.get(), Fiber::kStackBytes, fiber.sanitizer_fiber);
  switch_context(scheduler.continuation, fiber.continuation);
  after_switch(fake_stack, false);
}

void yield_to_scheduler() {
  Fiber& fiber = *scheduler.running;
  void* fake_stack = nullptr;
  before_switch(&fake_stack, scheduler.stack, scheduler.stack_bytes, scheduler.sanitizer_fiber);
  switch_context(fiber.continuation, scheduler.continuation);
  after_switch(fake_stack, true);
}

void run_fiber() {
  after_switch(nullptr, true);
  for (;;) {
    current_block->begins.acquire();
    try {
      (*scheduler.body)();
    } catch (...) {
      if (!current_block->failure) {
        current_block->failure = std::current_exception();
      }
    }
    current_block->ends.release();
    scheduler.running->has_returned = true;
    ++scheduler.steps;
    yield_to_scheduler();
  }
}

Fiber::Fiber() {
  ucontext_t& context = continuation.context;
  getcontext(&context);
  context.uc_stack = {};
  context.uc_stack.ss_sp = stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
#ifdef PEER_THREAD_SANITIZER
  sanitizer_fiber = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#ifdef PEER_THREAD_SANITIZER
  __tsan_destroy_fiber(sanitizer_fiber);
#endif
}

// Orders what an unfinished fiber did before the end of its block.
void abandon([[maybe_unused]] Fiber& fiber) {
#ifdef PEER_THREAD_SANITIZER
  __tsan_switch_to_fiber(fiber.sanitizer_fiber, __tsan_switch_to_fiber_no_sync);
  current_block->ends.release();
  __tsan_switch_to_fiber(scheduler.sanitizer_fiber, __tsan_switch_to_fiber_no_sync);
#endif
}

void arrive_and_wait(Barrier& barrier) {
  ++scheduler.steps;
  const unsigned round = barrier.round;
  Order& order = barrier.orders[round % 2];
  order.release();
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.round;
  } else {
    scheduler.running->barrier = &barrier;
    scheduler.running->round = round;
    yield_to_scheduler();
  }
  order.acquire();
}

}  // namespace

void play_grid(const GridShape& shape, const std::function<void()>& body) {
  Block block(shape);
  current_block = &block;
  scheduler.body = &body;
#ifdef PEER_THREAD_SANITIZER
  scheduler.sanitizer_fiber = __tsan_get_current_fiber();
#endif
  // Fibers are kept for the next grid, because making them takes longer than running a small grid.
  // After a failure they are in the middle of the body, so they are replaced.
  static std::vector<std::unique_ptr<Fiber> > fibers;
  const auto fail = [&](std::exception_ptr failure) {
    for (unsigned t = 0; t < shape.threads; ++t) {
      abandon(*fibers[t]);
    }
    block.ends.acquire();
    fibers.clear();
    std::rethrow_exception(failure);
  };
  while (fibers.size() < shape.threads) {
    fibers.push_back(std::make_unique<Fiber>());
  }
  for (unsigned b = 0; b < shape.blocks; ++b) {
    block.begin(b, shape.shared_bytes);
    for (unsigned t = 0; t < shape.threads; ++t) {
      fibers[t]->has_returned = false;
      fibers[t]->barrier = nullptr;
    }
    for (unsigned remaining = shape.threads; remaining > 0;) {
      const unsigned steps = scheduler.steps;
      remaining = 0;
      for (unsigned t = 0; t < shape.threads; ++t) {
        Fiber& fiber = *fibers[t];
        if (!fiber.has_returned && !fiber.is_waiting()) {
          current = &block.players[t];
          run_until_waiting(fiber);
        }
        if (block.failure) {
          fail(block.failure);
        }
        remaining += !fiber.has_returned;
      }
      if (remaining > 0 && scheduler.steps == steps) {
        fail(std::make_exception_ptr(std::logic_error(
            std::to_string(remaining) + " threads wait for others that do not arrive")));
      }
    }
    block.ends.acquire();
  }
}

size_t shared_bytes_limit() { return shared_limit; }

void limit_shared_bytes(size_t bytes) { shared_limit = std::min(bytes, kSharedBytes); }

const ThreadPlace& thread_place() { return current->place; }

void block_barrier() { arrive_and_wait(current_block->whole); }

void warp_barrier() { arrive_and_wait(*current->warp); }

const unsigned char* exchange_in_warp(const void* contribution, size_t size) {
  Player& player = *current;
  unsigned char (*slots)[16] = player.warp->contributions[player.exchanges++ % 2];
  std::memcpy(slots[player.place.thread % kWarp], contribution, size);
  warp_barrier();
  return slots[0];
}

void cp_async(void* target, const void* source, size_t size) {
  std::memset(target, kGarbage, size);
  current->copies.push_back({target, source, size, current->groups});
}

void cp_async_commit() { ++current->groups; }

void cp_async_wait(size_t groups_in_flight) {
  std::vector<Copy>& copies = current->copies;
  const auto end = std::find_if(copies.begin(), copies.end(), [&](const Copy& copy) {
    return copy.group + groups_in_flight >= current->groups;
  });
  std::for_each(copies.begin(), end,
                [](const Copy& copy) { std::memcpy(copy.target, copy.source, copy.size); });
  copies.erase(copies.begin(), end);
}

}  // namespace peer::test
