// Runs a kernel that was compiled as ordinary C++, block after block: a block, or a cluster of
// `ranks` blocks that each have their own memory, is the calling thread alone, or several
// std::threads that wait for each other at barriers.
#include "emulate.h"

#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

namespace {

using fm::cuda::Emulated;

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::int64_t round = round_;
    if (++waiting_ == threads_) {
      waiting_ = 0, ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  const int threads_;
  int waiting_ = 0;
  std::int64_t round_ = 0;
};

// Two barriers in turn: a thread that leaves one late must not, by its lock, come after what others
// have done since on their way to the next. A race detector would take that for an order.
struct Thread : Emulated {
  Barrier* barriers;
  int turn;
};

void meet(Emulated* self) {
  Thread* const thread = static_cast<Thread*>(self);
  thread->barriers[thread->turn ^= 1].wait();
}
void nobody_to_meet(Emulated*) {}

}  // namespace

// `element` is 4 or 8, the bytes of a number: shared memory is full of NaN before every block.
extern "C" __attribute__((visibility("default"))) void fastmeta_emulate(void (*kernel)(const void*),
                                                                        void (*enter)(Emulated*),
                                                                        const void* args, int blocks,
                                                                        int ranks, int threads,
                                                                        std::int64_t bytes, int element) {
  struct alignas(64) Line {
    char at[64];
  };
  // allocations of their own: what lies beyond the end of one is not the next one
  std::vector<std::vector<Line>> shared(ranks, std::vector<Line>(bytes / 64 + 1));
  const auto poison = [&](std::vector<Line>& shared) {
    for (size_t i = 0; i < shared.size() * 64; i += element) {
      const float f = std::numeric_limits<float>::quiet_NaN();
      const double d = std::numeric_limits<double>::quiet_NaN();
      std::memcpy(shared[i / 64].at + i % 64, element == 4 ? static_cast<const void*>(&f) : &d, element);
    }
  };
  Barrier barriers[2] = {Barrier(threads), Barrier(threads)};
  const auto run = [&](int thread) {
    Thread self{{thread, threads, 0, blocks, {}, threads > 1 ? meet : nobody_to_meet}, barriers, 0};
    for (int rank = 0; rank < ranks; ++rank) self.shared[rank] = shared[rank].data();
    enter(&self);
    for (self.block = 0; self.block < blocks; ++self.block) {
      if (thread == 0)
        for (auto& one : shared) poison(one);
      self.barrier(&self);
      kernel(args);
      self.barrier(&self);
    }
    enter(nullptr);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
  run(0);
  for (std::thread& other : others) other.join();
}
