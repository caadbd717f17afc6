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
#define FM_ENTRY(kind) {#kind, fm::Kind::kind},
  return named<fm::Kind>(name, {FM_LAYER_KINDS(FM_ENTRY)}, "layer kind");
#undef FM_ENTRY
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
                   {"affine", F::affine},
                   {"adaptive", F::adaptive}},
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

// Copies a list of numbers, at most as many as there is room for.
template <class Array>
void fill(Array& to, const py::handle& from, const char* what) {
  size_t i = 0;
  for (const auto& item : from) {
    if (i == std::size(to)) throw std::invalid_argument(std::string("Plan: a layer has too many ") + what);
    to[i++] = item.cast<std::decay_t<decltype(to[0])>>();
  }
}

// values: (rows, cols, height, width, channels); layers: (kind, function, constants, inputs, output, params), -1 for
// none; params: (rows, cols, taps, matrix, constant, per_task, adapted, rate_element, rate_per_task, rate_per_step)
fm::Plan make_plan(bool is_double, const py::list& values, const py::list& layers, const py::list& params, int output,
                   const py::dict& options) {
  fm::Plan plan;
  plan.is_double = is_double;
  plan.output = output;
  for (const auto& item : values) {
    const auto v = item.cast<py::tuple>();
    fm::Value value;
    value.rows = v[0].cast<i64>(), value.cols = v[1].cast<i64>();
    value.height = v[2].cast<i64>(), value.width = v[3].cast<i64>(), value.channels = v[4].cast<bool>();
    plan.values.push_back(value);
  }
  for (const auto& item : layers) {
    const auto l = item.cast<py::tuple>();
    fm::Layer layer;
    layer.kind = kind_named(l[0].cast<std::string>());
    layer.function = function_named(l[1].cast<std::string>());
    fill(layer.constants, l[2], "constants");
    fill(layer.inputs, l[3], "inputs");
    layer.output = l[4].cast<int>();
    fill(layer.params, l[5], "parameters");
    plan.layers.push_back(layer);
  }
  for (const auto& item : params) {
    const auto p = item.cast<py::tuple>();
    fm::Param param;
    param.rows = p[0].cast<i64>(), param.cols = p[1].cast<i64>(), param.taps = p[2].cast<i64>();
    param.matrix = p[3].cast<bool>(), param.constant = p[4].cast<bool>();
    param.per_task = p[5].cast<bool>(), param.adapted = p[6].cast<bool>();
    param.rate_element = p[7].cast<bool>(), param.rate_per_task = p[8].cast<bool>();
    param.rate_per_step = p[9].cast<bool>();
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

constexpr size_t PER_BATCH = 7, OTHERS = 5;
using Addresses = std::vector<i64>;

template <class S>
S* pointer(const Addresses& at, size_t i) {
  return at.empty() ? nullptr : reinterpret_cast<S*>(at[i]);
}

// Addresses of one field of every parameter: all of them, or none.
struct ParamAddresses {
  const Addresses &data, &rate, &adapted_grad, &adapted, &grad, &rate_grad;
};

template <class S>
fm::Call<S> make_call(const fm::Plan& plan, i64 tasks, const ParamAddresses& params, const Addresses& support,
                      const Addresses& query, const Addresses& others, const std::vector<double>& step_weights) {
  fm::Call<S> call;
  call.tasks = tasks;
  for (size_t p = 0; p < plan.params.size(); ++p)
    call.params.push_back({pointer<const S>(params.data, p), pointer<const S>(params.rate, p),
                           pointer<const S>(params.adapted_grad, p), pointer<S>(params.adapted, p),
                           pointer<S>(params.grad, p), pointer<S>(params.rate_grad, p)});
  const auto batch = [](const Addresses& at) {
    return fm::BatchPointers<S>{pointer<const S>(at, 0), pointer<const void>(at, 1), pointer<const S>(at, 2),
                                pointer<const S>(at, 3), pointer<S>(at, 4),          pointer<S>(at, 5),
                                pointer<S>(at, 6)};
  };
  call.support = batch(support), call.query = batch(query);
  call.step_weights = step_weights;
  call.task_weights = pointer<const S>(others, 0), call.output_grad = pointer<const S>(others, 1);
  call.task_losses = pointer<S>(others, 2), call.loss = pointer<S>(others, 3), call.output = pointer<S>(others, 4);
  return call;
}

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("Plan.run: ") + what);
}

// Batches: x, y, weights, class_weights, grad_x, grad_y, grad_weights. Others: task_weights, output_grad,
// task_losses, loss, output. 0 is nothing, and so is an empty list.
int run_plan(const fm::Plan& plan, i64 tasks, int threads, const Addresses& data, const Addresses& rate,
             const Addresses& adapted_grad, const Addresses& adapted, const Addresses& grad, const Addresses& rate_grad,
             const Addresses& support, const Addresses& query, const Addresses& others,
             const std::vector<double>& step_weights, bool poison) {
  const size_t count = plan.params.size();
  require(tasks >= 1 && threads >= 1, "no tasks or no threads");
  for (const Addresses* field : {&data, &rate, &adapted_grad, &adapted, &grad, &rate_grad})
    require(field->empty() || field->size() == count, "wrong number of parameter addresses");
  for (const Addresses* batch : {&support, &query})
    require(batch->empty() || batch->size() == PER_BATCH, "wrong number of batch addresses");
  require(others.size() == OTHERS, "wrong number of other addresses");
  require(step_weights.empty() || i64(step_weights.size()) == plan.options.steps + 1, "step_weights are not steps + 1");
  require(plan.options.support == 0 || (!support.empty() && support[0]), "the support inputs are missing");
  require(plan.options.query == 0 || (!query.empty() && query[0]), "the query inputs are missing");
  require(plan.options.loss.kind == fm::LossKind::none || support[1], "the support targets are missing");
  require(plan.options.query_loss.kind == fm::LossKind::none || query[1], "the query targets are missing");
  require(!others[3] || others[2], "the loss needs the task losses");
  for (size_t p = 0; p < count; ++p) {
    require(!data.empty() && data[p], "a parameter is missing");
    require(!plan.params[p].adapted || (!rate.empty() && rate[p]), "a learning rate is missing");
  }
  const ParamAddresses params{data, rate, adapted_grad, adapted, grad, rate_grad};
  py::gil_scoped_release release;
  if (plan.is_double)
    return int(
        fm::run(plan, make_call<double>(plan, tasks, params, support, query, others, step_weights), threads, poison));
  return int(
      fm::run(plan, make_call<float>(plan, tasks, params, support, query, others, step_weights), threads, poison));
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
      .def("run", &run_plan, py::arg("tasks"), py::arg("threads"), py::arg("data"), py::arg("rate"),
           py::arg("adapted_grad"), py::arg("adapted"), py::arg("grad"), py::arg("rate_grad"), py::arg("support"),
           py::arg("query"), py::arg("others"), py::arg("step_weights"), py::arg("poison"))
      .def_property_readonly("workspace_bytes", [](const fm::Plan& p) { return p.at.total * (p.is_double ? 8 : 4); })
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
