// The extension module. It trusts nothing: descriptions are checked field by field, tensors come as
// tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "binding/arguments.h"
#include "binding/describe.h"
#include "binding/machine.h"
#include "binding/sorts.h"
#include "binding/tensors.h"
#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/measure.h"
#include "cpu/plan.h"
#include "cpu/run.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;
using fm::i64;
using fm::binding::Number;
using fm::binding::Part;
using fm::binding::Tensors;

namespace {

// Of one call; more than any machine has cores.
constexpr i64 MOST_THREADS = 1024;
// A meta-batch beyond this would not fit into any memory: sizes stay far from overflow.
constexpr i64 MOST_TASKS = i64(1) << 40;
// Of memory for a measurement of bandwidth, on all threads.
constexpr i64 MOST_BYTES = i64(1) << 30;

constexpr size_t PER_BATCH = 7, OTHERS = 7;
using Items = std::vector<py::handle>;

std::string text(const char* part) { return part; }
std::string text(i64 part) { return std::to_string(part); }

// The message is put together where it is needed only.
template <class... Parts>
void require(bool ok, Parts... parts) {
  if (!ok) throw std::invalid_argument(("Plan.run: " + ... + text(parts)));
}

int thread_count(i64 threads, const char* who, i64 most = MOST_THREADS) {
  if (threads < 1 || threads > most)
    throw std::invalid_argument(std::string(who) + ": threads must be from 1 to " + std::to_string(most) +
                                ", got " + std::to_string(threads));
  return int(threads);
}

// A plan, and not an object of its type that holds none.
const fm::Plan& initialised(py::handle self) {
  if (!py::isinstance<fm::Plan>(self)) throw py::type_error("Plan: self must be a Plan");
  auto* const instance = reinterpret_cast<py::detail::instance*>(self.ptr());
  if (!instance->get_value_and_holder().holder_constructed())
    throw py::type_error("Plan: made by Plan(...) only");
  return self.cast<const fm::Plan&>();
}

// What Plan.run was given. A list is empty where none of its tensors is there; an item is None
// where that one is not.
struct Given {
  Items data, rate, adapted_grad, adapted, grad, rate_grad, support, query, others;
  std::vector<i64> grad_offsets;  // of the parameters in grad[0], in elements; none: a tensor for each
};

// Reads what Plan.run was given for one plan.
template <class S>
class Reader {
 public:
  Reader(const fm::Plan& plan, i64 tasks, Tensors& tensors) : plan_(plan), tensors_(tensors) {
    call_.tasks = tasks;
  }

  fm::Call<S> read(const Given& given, const std::vector<double>& step_weights) {
    const fm::Options& o = plan_.options;
    const auto& f = given;
    const size_t count = plan_.params.size();
    const std::pair<const char*, const Items*> fields[] = {{"data", &f.data},
                                                           {"rate", &f.rate},
                                                           {"adapted_grad", &f.adapted_grad},
                                                           {"adapted", &f.adapted},
                                                           {"rate_grad", &f.rate_grad}};
    for (const auto& [name, items] : fields) expect(name, *items, count);
    if (f.grad_offsets.empty()) expect("grad", f.grad, count);
    expect("support", f.support, PER_BATCH), expect("query", f.query, PER_BATCH),
        expect("others", f.others, OTHERS);
    require(o.gradient || (f.grad.empty() && f.rate_grad.empty()),
            "grad and rate_grad are for plans with gradients");
    require(f.rate_grad.empty() || o.wants_rates, "rate_grad is for plans that want it");
    require(step_weights.empty() || i64(step_weights.size()) == o.steps + 1,
            "step_weights must be steps + 1");
    for (double s : step_weights) require(std::isfinite(s), "step_weights must be finite");
    call_.step_weights = step_weights;
    for (size_t p = 0; p < count; ++p) read_param(given, p);
    if (!f.grad_offsets.empty()) read_flat_gradient(given);
    read_batch("support", f.support, call_.support, o.support, o.support_per_step ? o.steps : 1, o.loss,
               o.wants_support_x);
    read_batch("query", f.query, call_.query, o.query, 1, o.query_loss, o.wants_query_x);
    const auto& out = plan_.values[plan_.output];
    const i64 tasks = call_.tasks, outputs = times(times(tasks, o.query), out.rows * out.cols);
    call_.task_weights = in(f.others, "others", 0, tasks);
    call_.output_grad = in(f.others, "others", 1, outputs);
    call_.task_losses = to(f.others, "others", 2, tasks);
    call_.loss = to(f.others, "others", 3, 1);
    call_.output = to(f.others, "others", 4, outputs);
    const i64 numbers = times(o.steps, fm::RULE_NUMBERS);
    call_.numbers = in(f.others, "others", 5, numbers);
    call_.number_grads = to(f.others, "others", 6, numbers);
    require(!o.rule.learns() || o.steps == 0 || call_.numbers,
            "others[5] must be a tensor: the rule has learned numbers");
    require(!call_.number_grads || (o.rule.learns() && o.gradient),
            "others[6] is for plans with gradients and learned numbers");
    require(!call_.loss || call_.task_losses, "others[3], the loss, needs others[2], the task losses");
    require(o.query > 0 || (!call_.output && !call_.output_grad),
            "others: there is no output without a query set");
    return std::move(call_);
  }

 private:
  static void expect(const char* field, const Items& items, size_t count) {
    require(items.empty() || items.size() == count, field, " must have ", i64(count), " items or none, got ",
            i64(items.size()));
  }

  void read_param(const Given& given, size_t p) {
    const fm::Param& param = plan_.params[p];
    const i64 numel = param.numel(), tasks = call_.tasks, own = param.per_task ? times(tasks, numel) : numel;
    const i64 rates =
        times(times(param.rate_per_step ? plan_.options.steps : 1, param.rate_per_task ? tasks : 1),
              param.rate_element ? numel : 1);
    fm::ParamPointers<S> at;
    at.data = in(given.data, "data", p, own);
    require(at.data, "data[", i64(p), "] must be a tensor, got None");
    if (param.adapted) {
      at.rate = read_rate(given.rate, p, rates);
      require(at.rate, "rate[", i64(p), "] must be a tensor, got None");
      at.rate_grad = to(given.rate_grad, "rate_grad", p, rates);
    }
    if (!param.constant) {
      const i64 all = times(tasks, numel);
      at.adapted_grad = in(given.adapted_grad, "adapted_grad", p, all);
      at.adapted = to(given.adapted, "adapted", p, all);
      if (given.grad_offsets.empty()) at.grad = to(given.grad, "grad", p, own);
    }
    call_.params.push_back(at);
  }

  // Often all parameters have one tensor: it is looked at once.
  const S* read_rate(const Items& items, size_t p, i64 count) {
    if (!items.empty() && items[p].is(rate_) && count == rate_count_) return rate_data_;
    rate_data_ = in(items, "rate", p, count);
    if (rate_data_) rate_ = items[p], rate_count_ = count;
    return rate_data_;
  }

  // One vector for all gradients, and where in it each one lies.
  void read_flat_gradient(const Given& given) {
    const auto& offsets = given.grad_offsets;
    require(given.grad.size() == 1, "grad must be one tensor where there are grad_offsets");
    require(offsets.size() <= call_.params.size(), "grad_offsets are more than parameters");
    const i64 size = tensors_.count(given.grad[0], {"grad", 0}, number());
    S* const base = to(given.grad, "grad", 0, size);
    require(base, "grad[0] must be a tensor, got None");
    for (size_t p = 0; p < offsets.size(); ++p) {
      const fm::Param& param = plan_.params[p];
      const i64 own = param.per_task ? times(call_.tasks, param.numel()) : param.numel();
      require(offsets[p] >= 0 && own <= size && offsets[p] <= size - own, "grad_offsets[", i64(p),
              "] lies outside of grad[0]");
      call_.params[p].grad = base + offsets[p];
    }
  }

  // x, y, weights, class_weights, grad_x, grad_y, grad_weights
  void read_batch(const char* field, const Items& items, fm::BatchPointers<S>& batch, i64 examples, i64 sets,
                  const fm::LossSpec& loss, bool wants_x) {
    const auto &x = plan_.values[0], &out = plan_.values[plan_.output];
    const bool none =
        items.empty() || std::all_of(items.begin(), items.end(), [](auto i) { return i.is_none(); });
    const bool has_loss = loss.kind != fm::LossKind::none, classes = loss.class_indices;
    require(examples > 0 || none, field, " must be empty, as the plan has none");
    require(examples == 0 || !none, field, "[0], the inputs, must be a tensor");
    if (none) return;
    const i64 all = times(times(call_.tasks, sets), examples), values = times(all, out.rows * out.cols);
    batch.x = in(items, field, 0, times(all, x.rows * x.cols));
    require(batch.x, field, "[0], the inputs, must be a tensor, got None");
    batch.y = tensors_.read(items[1], {field, 1}, classes ? times(all, out.rows) : values,
                            classes ? Number::i64 : number());
    require(has_loss ? batch.y != nullptr : items[1].is_none(), field,
            "[1], the targets, must be there where there is a loss, and only there");
    batch.weights = in(items, field, 2, all);
    // of classes or columns; a pos_weight of an output that is channels-last is one of rows
    const bool of_rows = out.channels && out.rows > 1 && loss.kind != fm::LossKind::cross_entropy;
    batch.class_weights = in(items, field, 3, of_rows ? out.rows : out.cols);
    batch.grad_x = to(items, field, 4, times(all, x.rows * x.cols));
    batch.grad_y = to(items, field, 5, values);
    batch.grad_weights = to(items, field, 6, all);
    require(!batch.grad_x || wants_x, field, "[4], the inputs' gradient, is for plans that want it");
    require(!batch.grad_y || (has_loss && !classes), field,
            "[5]: only targets of a loss that are no classes have one");
    require(plan_.options.gradient || (!batch.grad_y && !batch.grad_weights), field,
            ": the plan has no gradients");
  }

  static i64 times(i64 a, i64 b) {
    i64 product;
    require(!__builtin_mul_overflow(a, b, &product) && product <= (i64(1) << 60),
            "tasks are too many for the sizes");
    return product;
  }
  static constexpr Number number() { return sizeof(S) == 4 ? Number::f32 : Number::f64; }
  const S* in(const Items& items, const char* field, size_t i, i64 count) {
    return items.empty() ? nullptr
                         : static_cast<const S*>(tensors_.read(items[i], {field, i}, count, number()));
  }
  S* to(const Items& items, const char* field, size_t i, i64 count) {
    return items.empty() ? nullptr : static_cast<S*>(tensors_.write(items[i], {field, i}, count, number()));
  }

  const fm::Plan& plan_;
  Tensors& tensors_;
  fm::Call<S> call_;
  py::handle rate_;
  i64 rate_count_ = 0;
  const S* rate_data_ = nullptr;
};

template <class S>
int run_as(const fm::Plan& plan, i64 tasks, int threads, const Given& given,
           const std::vector<double>& step_weights, bool poison, Tensors& tensors) {
  const fm::Call<S> call = Reader<S>(plan, tasks, tensors).read(given, step_weights);
  py::gil_scoped_release release;
  return int(fm::run(plan, call, threads, poison));
}

// Batches: x, y, weights, class_weights, grad_x, grad_y, grad_weights. Others: task_weights,
// output_grad, task_losses, loss, output, learned numbers of the update rule and their gradients.
int run_plan(const py::args& args, const py::kwargs& kwargs) {
  static const char* const names[] = {"self",         "tasks",   "threads", "data",         "rate",
                                      "adapted_grad", "adapted", "grad",    "grad_offsets", "rate_grad",
                                      "support",      "query",   "others",  "step_weights", "poison"};
  const auto given = fm::binding::arguments("Plan.run", names, args, kwargs);
  const fm::Plan& plan = initialised(given[0]);
  const auto part = [&](size_t i) { return Part{"Plan.run", names[i]}; };
  const i64 tasks = part(1).integer(given[1]);
  require(tasks >= 1 && tasks <= MOST_TASKS, "tasks must be from 1 to 2^40, got ", tasks);
  const int threads = thread_count(part(2).integer(given[2]), "Plan.run");
  Tensors tensors(6 * plan.params.size() + 2 * PER_BATCH + OTHERS);
  const auto items = [&](size_t i) {
    part(i).check_list(given[i]);
    return tensors.items(given[i]);
  };
  Given all{items(3), items(4), items(5), items(6), items(7), items(9), items(10), items(11), items(12), {}};
  for (const py::handle offset : part(8).list(given[8])) all.grad_offsets.push_back(part(8).integer(offset));
  std::vector<double> step_weights;
  for (const py::handle weight : part(13).list(given[13])) step_weights.push_back(part(13).number(weight));
  const bool poison = part(14).boolean(given[14]);
  return plan.is_double ? run_as<double>(plan, tasks, threads, all, step_weights, poison, tensors)
                        : run_as<float>(plan, tasks, threads, all, step_weights, poison, tensors);
}

// A plan is made by __new__, so that there is none without a description; and an allocation that
// fails while pybind11 registers an object that __init__ has made would end the process.
py::object new_plan(const py::args& args, const py::kwargs& kwargs) {
  static const char* const names[] = {"cls", "is_double", "values", "layers", "params", "output", "options"};
  const auto given = fm::binding::arguments("Plan", names, args, kwargs);
  return py::cast(fm::binding::make_plan(given[1], given[2], given[3], given[4], given[5], given[6]));
}
// Not reached for what __new__ has made.
fm::Plan no_init(const py::args&, const py::kwargs&) { throw py::type_error("Plan: made by Plan(...) only"); }

// Measurements keep every thread busy: many more than cores would take minutes.
i64 most_measured() { return 2 * std::max<i64>(1, std::thread::hardware_concurrency()) + 8; }

double fma_peak(const py::args& args, const py::kwargs& kwargs) {
  static const char* const names[] = {"dtype", "threads"};
  const auto given = fm::binding::arguments("fma_peak", names, args, kwargs);
  const std::string dtype = Part{"fma_peak", "dtype"}.text(given[0]);
  if (dtype != "float32" && dtype != "float64")
    throw std::invalid_argument("fma_peak: dtype must be 'float32' or 'float64'");
  const int threads =
      thread_count(Part{"fma_peak", "threads"}.integer(given[1]), "fma_peak", most_measured());
  py::gil_scoped_release release;
  return fm::fma_peak(dtype == "float64", threads);
}

double cache_bandwidth(const py::args& args, const py::kwargs& kwargs) {
  static const char* const names[] = {"bytes", "threads"};
  const auto given = fm::binding::arguments("cache_bandwidth", names, args, kwargs);
  const i64 bytes = Part{"cache_bandwidth", "bytes"}.integer(given[0]);
  const int threads =
      thread_count(Part{"cache_bandwidth", "threads"}.integer(given[1]), "cache_bandwidth", most_measured());
  if (bytes < 1 || bytes > MOST_BYTES / threads)
    throw std::invalid_argument(
        "cache_bandwidth: bytes must be positive, and 2^30 at most on all threads, got " +
        std::to_string(bytes));
  py::gil_scoped_release release;
  return fm::stream_bandwidth(size_t(bytes), threads);
}

template <class S>
void run_elementary(fm::ElementaryName name, fm::Function function, i64 order, const fm::Kernels<S>& kernels,
                    const Items& inputs, py::handle output, const std::vector<double>& constants,
                    Tensors& tensors) {
  fm::Elementary<S> e{};
  e.name = name, e.function = function, e.order = int(order);
  const auto number = sizeof(S) == 4 ? Number::f32 : Number::f64;
  const fm::binding::Place to{"output", 0, "elementary"};
  e.count = output.is_none() ? 0 : tensors.count(output, to, number);
  const auto input = [&](size_t i) {
    const fm::binding::Place from{"inputs", i, "elementary"};
    const void* const data = tensors.read(inputs[i], from, e.count, number);
    if (!data) from.refuse("must be a tensor, got None");
    return static_cast<const S*>(data);
  };
  e.out = static_cast<S*>(tensors.write(output, to, e.count, number));
  if (!e.out) to.refuse("must be a tensor, got None");
  e.x = input(0), e.y = inputs.size() > 1 ? input(1) : nullptr;
  e.c0 = S(constants[0]), e.c1 = S(constants[1]);
  py::gil_scoped_release release;
  kernels.elementary(e);
}

// One function over tensors: an elementary one of x, or pow of x and y; an element-wise one of x, or
// with y = f(x) its first or second derivative.
void elementary(const py::args& args, const py::kwargs& kwargs) {
  static const char* const names[] = {"name", "order", "is_double", "constants", "inputs", "output"};
  const auto given = fm::binding::arguments("elementary", names, args, kwargs);
  const auto part = [&](size_t i) { return Part{"elementary", names[i]}; };
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("elementary: " + what); };
  const std::string name = part(0).text(given[0]);
  const i64 order = part(1).integer(given[1]);
  part(3).check_list(given[3]);
  fm::ElementaryName known = name == "pow" ? fm::ElementaryName::pow : fm::ElementaryName::none;
#define FM_ENTRY(entry) \
  if (name == #entry) known = fm::ElementaryName::entry;
  FM_ELEMENTARY(FM_ENTRY)
#undef FM_ENTRY
  // tanh, sigmoid and sin are both
  const bool element = known == fm::ElementaryName::none || PyList_GET_SIZE(given[3].ptr()) > 0;
  if (element) known = fm::ElementaryName::none;
  const auto function = element ? fm::binding::function_named(part(0), name) : fm::Function::none;
  if (order < 0 || order > (element ? 2 : 0))
    refuse("order must be 0, or 1 or 2 of an element-wise function, got " + std::to_string(order));
  std::vector<double> constants;
  for (const py::handle constant : part(3).list(given[3])) constants.push_back(part(3).number(constant));
  if (constants.size() != (element ? 2 : 0))
    refuse("constants must be two of an element-wise function, or none");
  constants.resize(2);
  part(4).check_list(given[4]);
  Tensors tensors(3);
  const Items inputs = tensors.items(given[4]);
  if (inputs.size() != (known == fm::ElementaryName::pow || order > 0 ? 2 : 1))
    refuse("inputs must be x, or x and y for pow and derivatives, got " + std::to_string(inputs.size()) +
           " items");
  const auto& isa = fm::instruction_set();
  if (part(2).boolean(given[2]))
    run_elementary<double>(known, function, order, *isa.f64, inputs, given[5], constants, tensors);
  else
    run_elementary<float>(known, function, order, *isa.f32, inputs, given[5], constants, tensors);
}

i64 element_bytes(const fm::Plan& plan) { return plan.is_double ? 8 : 4; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names = {fm::isa_base.name};
#ifdef FASTMETA_X86
  names.push_back(fm::isa_avx2.name);
  names.push_back(fm::isa_avx512.name);
#endif
  return names;
}

// {kind: (inputs, least constants, most constants, parameters, required parameters)}
py::dict kinds() {
  py::dict all;
  const auto add = [&](fm::Kind kind) {
    const fm::Rules r = fm::rules(kind);
    all[fm::name_of(kind)] =
        py::make_tuple(r.inputs, r.least_constants, r.most_constants, r.params, r.required_params);
  };
#define FM_ADD(kind) add(fm::Kind::kind);
  FM_LAYER_KINDS(FM_ADD)
#undef FM_ADD
  return all;
}

std::vector<std::string> functions() {
#define FM_NAME(name, formula) #name,
  return {FM_FUNCTIONS(FM_NAME)};
#undef FM_NAME
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastmeta's C++ engine; fastmeta.backends.cpu is its only user.";
  py::class_<fm::Plan>(m, "Plan")
      .def_static("__new__", &new_plan)
      .def(py::init(&no_init), "Plan(is_double, values, layers, params, output, options)")
      .def("run", &run_plan,
           "run(tasks, threads, data, rate, adapted_grad, adapted, grad, grad_offsets, rate_grad, support, "
           "query, "
           "others, step_weights, poison)")
      .def_property_readonly("workspace_bytes",
                             [](py::handle self) {
                               const fm::Plan& plan = initialised(self);
                               return plan.at.total * element_bytes(plan);
                             })
      .def_property_readonly("parameter_set_bytes", [](py::handle self) {
        const fm::Plan& plan = initialised(self);
        return plan.set_size * element_bytes(plan);
      });
  fm::binding::add_machine(m);
  m.def("instruction_set", [] { return fm::instruction_set().name; }, "The instruction set in use.");
  m.def("instruction_sets", &instruction_sets, "The instruction sets compiled in.");
  m.def("kinds", &kinds,
        "The layer kinds, each with (inputs, least constants, most constants, parameters, required ones).");
  m.def("rule_numbers", &fm::binding::rule_numbers,
        "The numbers of update rules, in the order of their lists.");
  m.def("functions", &functions, "The names of the element-wise functions.");
  m.attr("MOST_THREADS") = MOST_THREADS;
  m.attr("NARROW_ROWS") = fm::NARROW_ROWS;
  fm::binding::Torch::get();
  m.def("sorts", &fm::binding::sorts,
        "sorts(tensors): their dtypes, devices and shapes as bytes, None where one is none or unusual.");
  m.def("last_run_seconds", &fm::last_run_seconds, "Seconds inside the last Plan.run of this process.");
  m.def("scratch_bytes", &fm::scratch_bytes, py::call_guard<py::gil_scoped_release>(),
        "Bytes of scratch memory held by all workers.");
  m.def("release_scratch", &fm::release_scratch, py::call_guard<py::gil_scoped_release>(),
        "Gives all scratch memory back.");
  m.def("fma_peak", &fma_peak, "fma_peak(dtype, threads): GFLOP/s of multiply-adds in registers.");
  m.def("elementary", &elementary,
        "elementary(name, order, is_double, constants, inputs, output): one function over tensors, for tests "
        "and measurements.");
  m.def("cache_bandwidth", &cache_bandwidth,
        "cache_bandwidth(bytes, threads): GB/s of a streaming update over so many bytes a thread.");
}
