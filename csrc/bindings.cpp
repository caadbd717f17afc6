// The extension module: addresses in, nothing that Python owns kept.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/machine.h"
#include "cpu/run.h"
#include "cpu/thread_pool.h"
#include "engine/kernels.h"
#include "engine/plan.h"

namespace py = pybind11;
using fm::i64;

namespace {

template <class E>
E named(const std::string& name, const std::vector<std::pair<const char*, E>>& table, const char* what) {
  for (const auto& [key, value] : table)
    if (name == key) return value;
  throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
}

fm::Kind kind_named(const std::string& name) {
  using K = fm::Kind;
  return named<K>(
      name, {{"linear", K::linear}, {"elementwise", K::elementwise}, {"reshape", K::reshape}, {"add", K::add}},
      "layer kind");
}

fm::Function function_named(const std::string& name) {
  using F = fm::Function;
  if (name.empty()) return F::relu;
  return named<F>(name,
                  {{"relu", F::relu},
                   {"leaky_relu", F::leaky_relu},
                   {"elu", F::elu},
                   {"gelu", F::gelu},
                   {"gelu_tanh", F::gelu_tanh},
                   {"silu", F::silu},
                   {"tanh", F::tanh},
                   {"sigmoid", F::sigmoid},
                   {"softplus", F::softplus},
                   {"sin", F::sin},
                   {"affine", F::affine}},
                  "element-wise function");
}

fm::LossSpec loss_spec(const py::object& given) {
  fm::LossSpec spec;
  if (given.is_none()) return spec;
  using L = fm::LossKind;
  const auto d = given.cast<py::dict>();
  spec.kind = named<L>(d["kind"].cast<std::string>(),
                       {{"mse", L::mse},
                        {"l1", L::l1},
                        {"smooth_l1", L::smooth_l1},
                        {"huber", L::huber},
                        {"cross_entropy", L::cross_entropy},
                        {"bce_with_logits", L::bce_with_logits}},
                       "loss");
  spec.sum = d["sum"].cast<bool>();
  spec.normalise_sum = d["normalise_sum"].cast<bool>();
  spec.class_indices = d["class_indices"].cast<bool>();
  spec.beta = d["beta"].cast<double>();
  spec.label_smoothing = d["label_smoothing"].cast<double>();
  spec.ignore_index = d["ignore_index"].cast<i64>();
  return spec;
}

// values: (rows, cols); layers: (kind, function, c0, c1, input0, input1, output, weight, bias), -1 for none;
// params: (rows, cols, matrix, per_task, adapted, rate_element, rate_per_task, rate_per_step)
fm::Plan make_plan(bool is_double, const py::list& values, const py::list& layers, const py::list& params, int output,
                   const py::dict& options) {
  fm::Plan plan;
  plan.is_double = is_double;
  plan.output = output;
  for (const auto& item : values) {
    const auto v = item.cast<py::tuple>();
    fm::Value value;
    value.rows = v[0].cast<i64>(), value.cols = v[1].cast<i64>();
    plan.values.push_back(value);
  }
  for (const auto& item : layers) {
    const auto l = item.cast<py::tuple>();
    fm::Layer layer;
    layer.kind = kind_named(l[0].cast<std::string>());
    layer.function = function_named(l[1].cast<std::string>());
    layer.c0 = l[2].cast<double>(), layer.c1 = l[3].cast<double>();
    layer.inputs[0] = l[4].cast<int>(), layer.inputs[1] = l[5].cast<int>(), layer.output = l[6].cast<int>();
    layer.weight = l[7].cast<int>(), layer.bias = l[8].cast<int>();
    plan.layers.push_back(layer);
  }
  for (const auto& item : params) {
    const auto p = item.cast<py::tuple>();
    fm::Param param;
    param.rows = p[0].cast<i64>(), param.cols = p[1].cast<i64>(), param.matrix = p[2].cast<bool>();
    param.per_task = p[3].cast<bool>(), param.adapted = p[4].cast<bool>();
    param.rate_element = p[5].cast<bool>(), param.rate_per_task = p[6].cast<bool>();
    param.rate_per_step = p[7].cast<bool>();
    plan.params.push_back(param);
  }
  fm::Options& o = plan.options;
  o.steps = options["steps"].cast<i64>();
  o.support = options["support"].cast<i64>(), o.query = options["query"].cast<i64>();
  o.second_order = options["second_order"].cast<bool>(), o.store = options["store"].cast<bool>();
  o.gradient = options["gradient"].cast<bool>(), o.support_per_step = options["support_per_step"].cast<bool>();
  o.wants_rates = options["wants_rates"].cast<bool>();
  o.wants_support_x = options["wants_support_x"].cast<bool>();
  o.wants_query_x = options["wants_query_x"].cast<bool>();
  o.momentum = options["momentum"].cast<double>(), o.weight_decay = options["weight_decay"].cast<double>();
  o.loss = loss_spec(options["loss"]), o.query_loss = loss_spec(options["query_loss"]);
  plan.finish();
  return plan;
}

constexpr size_t PER_PARAM = 6, PER_BATCH = 7, OTHERS = 4;

template <class S>
S* pointer(i64 address) {
  return reinterpret_cast<S*>(address);
}

template <class S>
fm::Call<S> make_call(const fm::Plan& plan, i64 tasks, const std::vector<i64>& at, std::vector<double> step_weights) {
  fm::Call<S> call;
  call.tasks = tasks;
  size_t i = 0;
  for (size_t p = 0; p < plan.params.size(); ++p, i += PER_PARAM)
    call.params.push_back({pointer<const S>(at[i]), pointer<const S>(at[i + 1]), pointer<const S>(at[i + 2]),
                           pointer<S>(at[i + 3]), pointer<S>(at[i + 4]), pointer<S>(at[i + 5])});
  for (auto* batch : {&call.support, &call.query}) {
    *batch = {pointer<const S>(at[i]),     pointer<const void>(at[i + 1]), pointer<const S>(at[i + 2]),
              pointer<const S>(at[i + 3]), pointer<S>(at[i + 4]),          pointer<S>(at[i + 5]),
              pointer<S>(at[i + 6])};
    i += PER_BATCH;
  }
  call.step_weights = std::move(step_weights);
  call.task_weights = pointer<const S>(at[i]), call.output_grad = pointer<const S>(at[i + 1]);
  call.task_losses = pointer<S>(at[i + 2]), call.output = pointer<S>(at[i + 3]);
  return call;
}

// Addresses: for every parameter data, rate, adapted_grad, adapted, grad, rate_grad; for support and query x, y,
// weights, class_weights, grad_x, grad_y, grad_weights; then task_weights, output_grad, task_losses, output. 0: none.
int run_plan(const fm::Plan& plan, i64 tasks, int threads, const std::vector<i64>& addresses,
             const std::vector<double>& step_weights, bool poison) {
  if (addresses.size() != plan.params.size() * PER_PARAM + 2 * PER_BATCH + OTHERS || tasks < 1 || threads < 1)
    throw std::invalid_argument("Plan.run: wrong number of addresses, tasks or threads");
  if (!step_weights.empty() && i64(step_weights.size()) != plan.options.steps + 1)
    throw std::invalid_argument("Plan.run: step_weights must hold steps + 1 numbers");
  if ((plan.options.support > 0 && !addresses[plan.params.size() * PER_PARAM]) ||
      (plan.options.query > 0 && !addresses[plan.params.size() * PER_PARAM + PER_BATCH]))
    throw std::invalid_argument("Plan.run: an input is missing");
  for (size_t p = 0; p < plan.params.size(); ++p)
    if (!addresses[p * PER_PARAM] || (plan.params[p].adapted && !addresses[p * PER_PARAM + 1]))
      throw std::invalid_argument("Plan.run: a parameter or its rate is missing");
  py::gil_scoped_release release;
  if (plan.is_double)
    return int(fm::run(plan, make_call<double>(plan, tasks, addresses, step_weights), threads, poison));
  return int(fm::run(plan, make_call<float>(plan, tasks, addresses, step_weights), threads, poison));
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names = {fm::isa_base.name};
#ifdef FASTMETA_X86
  names.push_back(fm::isa_avx2.name);
  names.push_back(fm::isa_avx512.name);
#endif
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastmeta's C++ engine; fastmeta.backends.cpu is its only user.";
  py::class_<fm::Plan>(m, "Plan")
      .def(py::init(&make_plan), py::arg("is_double"), py::arg("values"), py::arg("layers"), py::arg("params"),
           py::arg("output"), py::arg("options"))
      .def("run", &run_plan, py::arg("tasks"), py::arg("threads"), py::arg("addresses"), py::arg("step_weights"),
           py::arg("poison"))
      .def_property_readonly("workspace_bytes",
                             [](const fm::Plan& p) { return p.at.total * (p.is_double ? 8 : 4); })
      .def_property_readonly("parameter_set_bytes",
                             [](const fm::Plan& p) { return p.set_size * (p.is_double ? 8 : 4); });
  m.def("instruction_set", [] { return fm::instruction_set().name; }, "The instruction set in use.");
  m.def("instruction_sets", &instruction_sets, "The instruction sets compiled in.");
  m.def("last_run_seconds", &fm::last_run_seconds, "Seconds inside the last Plan.run of this process.");
  m.def("scratch_bytes", &fm::scratch_bytes, "Bytes of scratch memory held by all workers.");
  m.def("release_scratch", &fm::release_scratch, "Gives all scratch memory back.");
  m.def(
      "fma_peak",
      [](const std::string& dtype, int threads) {
        if ((dtype != "float32" && dtype != "float64") || threads < 1)
          throw std::invalid_argument("fma_peak: expected 'float32' or 'float64' and at least one thread");
        py::gil_scoped_release release;
        return fm::fma_peak(dtype == "float64", threads);
      },
      py::arg("dtype"), py::arg("threads"), "GFLOP/s of multiply-adds in registers.");
  m.def(
      "cache_bandwidth",
      [](i64 bytes, int threads) {
        if (bytes < 1 || threads < 1) throw std::invalid_argument("cache_bandwidth: expected positive numbers");
        py::gil_scoped_release release;
        return fm::stream_bandwidth(size_t(bytes), threads);
      },
      py::arg("bytes"), py::arg("threads"), "GB/s of a streaming update over so many bytes a thread.");
}
