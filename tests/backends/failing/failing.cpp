// Preloaded: makes the n-th allocation of fastmeta's extension fail, or the next starts of threads.
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> allocation{0}, threads{0};  // how many until one fails; how many fail

bool of_extension(void* caller) {
  Dl_info info;
  return dladdr(caller, &info) && info.dli_fname && std::strstr(info.dli_fname, "fastmeta/_C.");
}

bool fails(void* caller) { return allocation.load() > 0 && of_extension(caller) && --allocation == 0; }

}  // namespace

extern "C" {

void failing_allocation(long n) { allocation = n; }
long failing_allocation_left() { return allocation; }
void failing_threads(long n) { threads = n; }
long failing_threads_left() { return threads; }

void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  if (fails(__builtin_return_address(0))) return nullptr;
  void* made = nullptr;
  return posix_memalign(&made, alignment, bytes) ? nullptr : made;
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const Create real = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  if (threads.load() > 0) {
    --threads;
    return EAGAIN;
  }
  return real(thread, attributes, start, argument);
}
}

void* operator new(std::size_t bytes) {
  void* const made = fails(__builtin_return_address(0)) ? nullptr : std::malloc(bytes ? bytes : 1);
  if (!made) throw std::bad_alloc();
  return made;
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
