#include "grid_player.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifndef PEER_PLAY_WITH_THREADS
#include <ucontext.h>

#include <csetjmp>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

alignas(16) unsigned char peer_shared_memory[peer::test::kSharedBytes];

namespace peer::test {

namespace {

constexpr unsigned kWarp = 32;
constexpr int kGarbage = 0xff;  // what memory holds before anything is written to it: NaN

// Threads that wait for each other, again and again. Lanes of a warp leave what they exchange here,
// in turns, so that a lane's next contribution does not meet those that are still being read.
struct Meeting {
  unsigned members = 0;
  unsigned arrived = 0;
  unsigned round = 0;
  // Where players are threads of the system. Each meeting has its own lock: one for all would order
  // what only a barrier may, and hide races.
  std::mutex mutex;
  std::condition_variable over;
  alignas(16) unsigned char contributions[2][kWarp][16];

  void end_for_all() {
    const std::lock_guard lock(mutex);  // nobody is between looking and waiting
    over.notify_all();
  }
};

struct Copy {
  void* target;
  const void* source;
  size_t size;
  size_t batch;
};

struct Player {
  Place place;
  Meeting* warp = nullptr;
  unsigned exchanges = 0;
  std::vector<Copy> copies;  // still to be made
  size_t batches = 0;        // of copies, that have ended
};

thread_local Player* current = nullptr;

size_t shared_limit = kSharedBytes;

void prepare_shared_memory(size_t bytes) {
  if (bytes > shared_limit) {
    throw std::logic_error("a block asks for " + std::to_string(bytes) +
                           " bytes of shared memory, more than there are");
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(peer_shared_memory, kSharedBytes);
#endif
  std::memset(peer_shared_memory, kGarbage, kSharedBytes);
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(peer_shared_memory + bytes, kSharedBytes - bytes);
#endif
}

// What both ways of playing have alike: the players of one block, and where they meet.
struct Block {
  explicit Block(const GridShape& shape) : players(shape.threads), warps(shape.threads / kWarp) {
    if (shape.threads % kWarp != 0) {
      throw std::logic_error("a block of " + std::to_string(shape.threads) +
                             " threads is not made of whole warps");
    }
    whole.members = shape.threads;
    for (Meeting& warp : warps) {
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
  }

  std::vector<Player> players;
  Meeting whole;
  std::vector<Meeting> warps;
  std::exception_ptr failure;
};

Block* block_played = nullptr;

}  // namespace

#ifdef PEER_PLAY_WITH_THREADS

namespace {

std::mutex failure_mutex;
std::atomic<bool> is_over = false;  // some thread failed: nobody waits any more

struct Abandoned {};

void meet(Meeting& meeting) {
  std::unique_lock lock(meeting.mutex);
  if (is_over) {
    throw Abandoned();
  }
  const unsigned round = meeting.round;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.round;
    meeting.over.notify_all();
    return;
  }
  // Long enough for the slowest sanitizer, short enough to tell a deadlock.
  const bool met = meeting.over.wait_for(lock, std::chrono::seconds(60),
                                         [&] { return meeting.round != round || is_over; });
  if (!met) {
    throw std::logic_error("threads wait for others that do not come");
  }
  if (meeting.round == round) {
    throw Abandoned();
  }
}

}  // namespace

void play_grid(const GridShape& shape, const std::function<void()>& body) {
  Block block(shape);
  block_played = &block;
  is_over = false;
  for (unsigned b = 0; b < shape.blocks && !block.failure; ++b) {
    block.begin(b, shape.shared_bytes);
    std::vector<std::thread> threads;
    for (Player& player : block.players) {
      threads.emplace_back([&] {
        current = &player;
        try {
          body();
        } catch (const Abandoned&) {
        } catch (...) {
          {
            const std::lock_guard lock(failure_mutex);
            if (!block.failure) {
              block.failure = std::current_exception();
            }
          }
          is_over = true;
          block.whole.end_for_all();
          std::for_each(block.warps.begin(), block.warps.end(),
                        [](Meeting& warp) { warp.end_for_all(); });
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  }
  if (block.failure) {
    std::rethrow_exception(block.failure);
  }
}

#else

namespace {

// Where a fiber or the scheduler goes on. The stack of a fiber is made by ucontext; from then on
// _setjmp and _longjmp switch, which make no system call and so take a tenth of the time.
// AddressSanitizer follows swapcontext alone.
#ifdef __SANITIZE_ADDRESS__
struct Continuation {
  ucontext_t context;
};

void switch_context(Continuation& from, Continuation& to) {
  swapcontext(&from.context, &to.context);
}
#else
struct Continuation {
  ucontext_t context;
  std::jmp_buf jump;
  bool has_run = false;
};

void switch_context(Continuation& from, Continuation& to) {
  if (_setjmp(from.jump) != 0) {
    return;
  }
  from.has_run = true;
  if (to.has_run) {
    _longjmp(to.jump, 1);
  }
  setcontext(&to.context);
}
#endif

// A thread of a block, with a stack of its own. It plays one block after the other.
struct Fiber {
  static constexpr size_t kStackBytes = 256 << 10;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  Continuation continuation;
  bool has_returned = false;
  const Meeting* meeting = nullptr;  // that it waits for, until the round is over
  unsigned round = 0;

  bool is_waiting() const { return meeting != nullptr && meeting->round == round; }
};

struct Scheduler {
  Continuation continuation;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  unsigned moves = 0;  // of any player: without one in a whole turn, there is a deadlock
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

Scheduler scheduler;

// AddressSanitizer must be told that the stack changes.
void before_switch([[maybe_unused]] void** fake_stack,
                   [[maybe_unused]] const void* stack,
                   [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
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
  before_switch(&fake_stack, fiber.stack.get(), Fiber::kStackBytes);
  switch_context(scheduler.continuation, fiber.continuation);
  after_switch(fake_stack, false);
}

void wait_for_turn() {
  Fiber& fiber = *scheduler.running;
  void* fake_stack = nullptr;
  before_switch(&fake_stack, scheduler.stack, scheduler.stack_bytes);
  switch_context(fiber.continuation, scheduler.continuation);
  after_switch(fake_stack, true);
}

void run_fiber() {
  after_switch(nullptr, true);
  for (;;) {
    try {
      (*scheduler.body)();
    } catch (...) {
      if (!block_played->failure) {
        block_played->failure = std::current_exception();
      }
    }
    scheduler.running->has_returned = true;
    ++scheduler.moves;
    wait_for_turn();
  }
}

void make_fiber(Fiber& fiber) {
  ucontext_t& context = fiber.continuation.context;
  getcontext(&context);
  context.uc_stack = {};
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = Fiber::kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
}

void meet(Meeting& meeting) {
  ++scheduler.moves;
  const unsigned round = meeting.round;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  scheduler.running->meeting = &meeting;
  scheduler.running->round = round;
  wait_for_turn();
}

}  // namespace

void play_grid(const GridShape& shape, const std::function<void()>& body) {
  Block block(shape);
  block_played = &block;
  scheduler.body = &body;
  // Fibers outlive the grid: making them takes longer than playing a small one. After a failure
  // they are somewhere in the middle of it, and new ones are made.
  static std::vector<std::unique_ptr<Fiber> > fibers;
  const auto fail = [&](std::exception_ptr failure) {
    fibers.clear();
    std::rethrow_exception(failure);
  };
  while (fibers.size() < shape.threads) {
    fibers.push_back(std::make_unique<Fiber>());
    make_fiber(*fibers.back());
  }
  for (unsigned b = 0; b < shape.blocks; ++b) {
    block.begin(b, shape.shared_bytes);
    for (unsigned t = 0; t < shape.threads; ++t) {
      fibers[t]->has_returned = false;
      fibers[t]->meeting = nullptr;
    }
    for (unsigned remaining = shape.threads; remaining > 0;) {
      const unsigned moves = scheduler.moves;
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
      if (remaining > 0 && scheduler.moves == moves) {
        fail(std::make_exception_ptr(std::logic_error(
            std::to_string(remaining) + " threads wait for others that do not come")));
      }
    }
  }
}

#endif

size_t shared_bytes_limit() { return shared_limit; }

void limit_shared_bytes(size_t bytes) { shared_limit = std::min(bytes, kSharedBytes); }

const Place& place() { return current->place; }

void wait_for_block() { meet(block_played->whole); }

void wait_for_warp() { meet(*current->warp); }

const unsigned char* exchange_in_warp(const void* contribution, size_t size) {
  Player& player = *current;
  unsigned char (*slots)[16] = player.warp->contributions[player.exchanges++ % 2];
  std::memcpy(slots[player.place.thread % kWarp], contribution, size);
  wait_for_warp();
  return slots[0];
}

void cp_async(void* target, const void* source, size_t size) {
  std::memset(target, kGarbage, size);
  current->copies.push_back({target, source, size, current->batches});
}

void end_batch_of_copies() { ++current->batches; }

void wait_for_copies(size_t batches_left) {
  std::vector<Copy>& copies = current->copies;
  const auto end = std::find_if(copies.begin(), copies.end(), [&](const Copy& copy) {
    return copy.batch + batches_left >= current->batches;
  });
  std::for_each(copies.begin(), end,
                [](const Copy& copy) { std::memcpy(copy.target, copy.source, copy.size); });
  copies.erase(copies.begin(), end);
}

}  // namespace peer::test
