// A program without Python that runs the engine on several threads, to be built with
// ThreadSanitizer: the pool, tasks over threads, kernels over threads, two callers at once, a job
// that throws, a fork. It fails where the bits depend on the number of threads. With an argument it
// plants a race instead, which the sanitizer must report.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/run.h"
#include "cpu/thread_pool.h"

namespace {

using fm::i64;

struct Buffers {
  std::vector<std::vector<double>> all;
  double* take(i64 n) { return all.emplace_back(size_t(n), 0.0).data(); }
  const double* numbers(i64 n) {
    double* const p = take(n);
    for (i64 i = 0; i < n; ++i) p[i] = double((i * 7919) % 101) / 101 - 0.5;
    return p;
  }
};

fm::Value value(i64 rows, i64 cols, bool from_params = true) {
  fm::Value v;
  v.from_params = from_params;
  v.rows = rows, v.cols = cols, v.height = rows;
  return v;
}

fm::Layer layer(fm::Kind kind, int in, int out, int weight = -1) {
  fm::Layer l;
  l.kind = kind, l.inputs[0] = in, l.output = out, l.params[0] = weight;
  return l;
}

// linear, tanh, linear: [N, width] -> [N, 3]
fm::Plan network(i64 width, i64 hidden, i64 examples) {
  fm::Plan plan;
  plan.is_double = true;
  plan.values = {value(1, width, false), value(1, hidden), value(1, hidden), value(1, 3)};
  plan.layers = {layer(fm::Kind::linear, 0, 1, 0), layer(fm::Kind::elementwise, 1, 2),
                 layer(fm::Kind::linear, 2, 3, 1)};
  plan.layers[1].function = fm::Function::tanh;
  for (const auto [rows, cols] : {std::pair{hidden, width}, std::pair{i64(3), hidden}}) {
    fm::Param p;
    p.rows = rows, p.cols = cols, p.matrix = p.adapted = true;
    plan.params.push_back(p);
  }
  plan.output = 3;
  fm::Options& o = plan.options;
  o.steps = 2, o.support = o.query = examples, o.gradient = true;
  o.loss.kind = o.query_loss.kind = fm::LossKind::mse;
  plan.finish();
  return plan;
}

// The gradients of one call.
std::vector<double> gradients(const fm::Plan& plan, i64 tasks, int threads) {
  Buffers buffers;
  fm::Call<double> call;
  call.tasks = tasks;
  std::vector<double*> grads;
  for (const fm::Param& p : plan.params) {
    fm::ParamPointers<double> at;
    at.data = buffers.numbers(p.numel());
    at.rate = buffers.numbers(1);
    grads.push_back(at.grad = buffers.take(p.numel()));
    call.params.push_back(at);
  }
  const i64 in = plan.values[0].rows * plan.values[0].cols;
  for (auto* batch : {&call.support, &call.query}) {
    batch->x = buffers.numbers(tasks * plan.options.support * in);
    batch->y = buffers.numbers(tasks * plan.options.support * 3);
  }
  call.task_losses = buffers.take(tasks), call.loss = buffers.take(1);
  fm::run(plan, call, threads, false);
  std::vector<double> result;
  for (size_t p = 0; p < grads.size(); ++p)
    result.insert(result.end(), grads[p], grads[p] + plan.params[p].numel());
  return result;
}

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

void check_bits(const char* what, const fm::Plan& plan, i64 tasks) {
  const std::vector<double> want = gradients(plan, tasks, 1);
  for (int threads : {2, 3, 6})
    for (int again = 0; again < 3; ++again) expect(same_bits(gradients(plan, tasks, threads), want), what);
}

void check_jobs() {
  std::vector<int> done(100, 0);
  fm::parallel(4, 100, [&](int i, int) { done[size_t(i)]++; });
  for (int count : done) expect(count == 1, "every job runs once");
  std::vector<int> others(20, 0);
  try {
    fm::parallel(4, 20, [&](int i, int) {
      others[size_t(i)]++;
      if (i % 7 == 3) throw std::runtime_error("job");
    });
    expect(false, "an exception of a job comes out");
  } catch (const std::runtime_error&) {
  }
  for (int count : others) expect(count == 1, "a job that throws stops no other");
}

int plant_race() {
  int sum = 0;
  fm::parallel(4, 100, [&](int i, int) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // until others have claimed their jobs, too
    sum += i;
  });
  return sum == -1;
}

}  // namespace

int main(int count, char**) {
  if (count > 1) return plant_race();
  check_jobs();
  const fm::Plan small = network(4, 5, 3), large = network(70, 160, 40);
  check_bits("tasks over threads", small, 7);
  check_bits("kernels over threads", large, 1);
  std::thread other([&] { check_bits("two callers, small", small, 5); });
  check_bits("two callers, large", large, 2);
  other.join();
  fm::release_scratch();
  check_bits("after scratch memory was given back", small, 3);
  if (const pid_t child = fork()) {
    int status = 1;
    waitpid(child, &status, 0);
    expect(status == 0, "a forked child works");
  } else {
    check_jobs();
    check_bits("in a forked child", small, 7);
    _exit(failures ? 1 : 0);
  }
  if (!failures) std::puts("ok");
  return failures ? 1 : 0;
}
