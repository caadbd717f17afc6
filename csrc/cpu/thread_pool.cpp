#include "thread_pool.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
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
  std::vector<Scratch> scratch = std::vector<Scratch>(1);  // by worker
  Scratch callers;                                         // of the one run at a time

  void run(int threads, int jobs, const std::function<void(int, int)>& job) {
    if (threads > jobs) threads = jobs;
    if (threads > 1) threads = start(threads);
    job_ = &job;
    jobs_ = jobs;
    next_.store(0, std::memory_order_relaxed);
    failure_ = nullptr;
    if (threads > 1) open(threads);
    work(0);
    if (threads > 1) close();
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  // The number of threads, the caller's among them, at most `threads`. A thread that cannot be
  // started is left out, which changes no bit, and is tried again at the next run.
  int start(int threads) {
    while (workers_ < threads - 1) try {
        if (int(scratch.size()) < workers_ + 2) scratch.emplace_back();
        const int id = workers_ + 1;
        std::thread([this, id] { loop(id); }).detach();
        workers_ = id;
      } catch (const std::exception&) {
        return workers_ + 1;
      }
    return threads;
  }

  void open(int threads) {
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

  // A worker that comes late sees that open_ is false and leaves; those inside are waited for.
  void close() {
    open_.store(false);
    while (active_.load() != 0) relax();
  }

  void work(int worker) {
    FlushDenormals flush;
    for (int i; (i = next_.fetch_add(1)) < jobs_;) try {
        (*job_)(i, worker);
      } catch (...) {
        std::lock_guard<std::mutex> lock(failure_mutex_);
        failure_ = std::current_exception();
      }
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
  std::exception_ptr failure_;  // of some job of this run
  std::mutex failure_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Never destroyed: its threads may outlive static destruction. A forked child has none of them and
// starts anew.
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

namespace {

// For a request of more than the machine has: the allocation would succeed, and the process would
// be killed when it uses the memory.
class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(std::size_t bytes, std::size_t there)
      : text_("the plan needs " + std::to_string(bytes >> 20) +
              " MiB of memory for each task that runs, this machine " + "has " +
              std::to_string(there >> 20)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

std::size_t machine_bytes() {
  static const std::size_t bytes = std::size_t(sysconf(_SC_PHYS_PAGES)) * std::size_t(sysconf(_SC_PAGE_SIZE));
  return bytes;
}

void* at_least(Scratch& s, std::size_t bytes) {
  if (s.bytes < bytes) {
    if (bytes > machine_bytes()) throw OutOfMemory(bytes, machine_bytes());
    std::free(s.data);
    s = {};
    const std::size_t rounded = (bytes + 63) / 64 * 64;
    s.data = std::aligned_alloc(64, rounded);
    if (!s.data) throw std::bad_alloc();
    s.bytes = rounded;
  }
  return s.data;
}

void release(Scratch& s) {
  std::free(s.data);
  s = {};
}

}  // namespace

void* scratch(int worker, std::size_t bytes) { return at_least(pool().scratch[worker], bytes); }

void* caller_scratch(std::size_t bytes) { return at_least(pool().callers, bytes); }

std::size_t scratch_bytes() {
  Session session;
  std::size_t total = pool().callers.bytes;
  for (const Scratch& s : pool().scratch) total += s.bytes;
  return total;
}

Session::Session() { pool().session.lock(); }
Session::~Session() { pool().session.unlock(); }

void release_scratch() {
  Session session;
  release(pool().callers);
  for (Scratch& s : pool().scratch) release(s);
}

}  // namespace fm
