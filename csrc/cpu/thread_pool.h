// The engine's own threads. (A second OpenMP runtime in a torch process makes both crawl.)
#pragma once

#include <cstddef>
#include <functional>

namespace fm {

// Runs job(i, worker) for i in [0, jobs) on up to `threads` threads, the caller (worker 0) among
// them, and returns when all are done. Jobs are claimed one by one, so a thread that is held up
// delays its own job only. There is one run at a time: a second caller waits. Denormals are flushed
// to zero inside a job. A run of a single job may start others from inside it.
//
// A job that throws stops no other; one of the exceptions is thrown when all are done. If threads
// cannot be started, the run has fewer.
void parallel(int threads, int jobs, const std::function<void(int job, int worker)>& job);

// Scratch memory of one worker, aligned to 64 bytes, at least `bytes` long; kept between runs. Only
// inside a job, or for worker 0 by the caller of `parallel` between runs while it holds a Session.
void* scratch(int worker, std::size_t bytes);

// The same for the caller alone, while it holds a Session: no job uses it.
void* caller_scratch(std::size_t bytes);

// Bytes of scratch memory held by all workers and the caller.
std::size_t scratch_bytes();

// Keeps other callers out over several parallel() calls of this thread.
class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

// Gives all scratch memory back.
void release_scratch();

}  // namespace fm
