#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fm {
namespace {

constexpr auto SPIN = std::chrono::microseconds(1000);

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Flush-to-zero for the lifetime of the object: denormals cost a hundred cycles each.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  unsigned long long saved_;
#endif
};

struct Scratch {
  void* data = nullptr;
  std::size_t bytes = 0;
};

class Pool {
 public:
  std::recursive_mutex session;
  std::vector<Scratch> scratch = std::vector<Scratch>(1);

  void run(int threads, int jobs, const std::function<void(int, int)>& job) {
    if (threads > jobs) threads = jobs;
    job_ = &job;
    jobs_ = jobs;
    next_.store(0, std::memory_order_relaxed);
    if (threads > 1) open(threads);
    work(0);
    if (threads > 1) close();
  }

 private:
  void open(int threads) {
    while (int(workers_) < threads - 1) {
      scratch.emplace_back();
      const int id = ++workers_;
      std::thread([this, id] { loop(id); }).detach();
    }
    helpers_.store(threads - 1);
    open_.store(true);
    epoch_.fetch_add(1);
    if (sleeping_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
  }

  // After open_ is false a worker that is late sees so and leaves; those inside are waited for.
  void close() {
    open_.store(false);
    while (active_.load() != 0) relax();
  }

  void work(int worker) {
    FlushDenormals flush;
    for (int i; (i = next_.fetch_add(1)) < jobs_;) (*job_)(i, worker);
  }

  void loop(int id) {
    unsigned seen = 0;
    for (;;) {
      wait(seen);
      seen = epoch_.load();
      active_.fetch_add(1);
      if (open_.load() && id <= helpers_.load()) work(id);
      active_.fetch_sub(1);
    }
  }

  void wait(unsigned seen) {
    const auto until = std::chrono::steady_clock::now() + SPIN;
    while (epoch_.load() == seen) {
      for (int i = 0; i < 32 && epoch_.load() == seen; ++i) relax();
      if (std::chrono::steady_clock::now() < until) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return epoch_.load() != seen; });
      sleeping_.fetch_sub(1);
    }
  }

  std::atomic<unsigned> epoch_{0};
  std::atomic<bool> open_{false};
  std::atomic<int> active_{0}, helpers_{0}, next_{0}, sleeping_{0};
  const std::function<void(int, int)>* job_ = nullptr;
  int jobs_ = 0, workers_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Never destroyed: its threads may outlive static destruction. A forked child has none of them and starts anew.
Pool* pool_instance = nullptr;

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(nullptr, nullptr, [] { pool_instance = new Pool; });
    pool_instance = new Pool;
  });
  return *pool_instance;
}

}  // namespace

void parallel(int threads, int jobs, const std::function<void(int, int)>& job) {
  std::lock_guard<std::recursive_mutex> lock(pool().session);
  pool().run(threads, jobs, job);
}

void* scratch(int worker, std::size_t bytes) {
  Scratch& s = pool().scratch[worker];
  if (s.bytes < bytes) {
    std::free(s.data);
    s = {};
    const std::size_t rounded = (bytes + 63) / 64 * 64;
    s.data = std::aligned_alloc(64, rounded);
    if (!s.data) throw std::bad_alloc();
    s.bytes = rounded;
  }
  return s.data;
}

std::size_t scratch_bytes() {
  std::size_t total = 0;
  for (const Scratch& s : pool().scratch) total += s.bytes;
  return total;
}

Session::Session() { pool().session.lock(); }
Session::~Session() { pool().session.unlock(); }

void release_scratch() {
  Session session;
  for (Scratch& s : pool().scratch) {
    std::free(s.data);
    s = {};
  }
}

}  // namespace fm
