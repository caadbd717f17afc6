// `_C.Machine`: traced programs from the numbers that fastmeta/backends/machine hands over, and
// calls of them. Programs are checked instruction by instruction; tensors come as tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/machine/machine.h"
#include "arguments.h"
#include "describe.h"
#include "tensors.h"

namespace fm::binding {

using machine::Machine;

// More would not fit into any memory: sizes stay far from overflow.
constexpr i64 MOST_ELEMENTS = i64(1) << 34;

inline i64 size_at(const Part& part, py::handle given, i64 least = 0, i64 most = MOST_ELEMENTS) {
  const i64 n = part.integer(given);
  if (n < least || n > most) part.refuse("is " + std::to_string(n) + ", which cannot be");
  return n;
}

template <class T>
std::vector<T> numbers_of(const Part& part, py::handle given) {
  if (!PyBytes_Check(given.ptr())) part.refuse("must be bytes");
  const size_t bytes = size_t(PyBytes_GET_SIZE(given.ptr()));
  if (bytes % sizeof(T)) part.refuse("is no whole number of words");
  std::vector<T> all(bytes / sizeof(T));
  if (bytes) std::memcpy(all.data(), PyBytes_AS_STRING(given.ptr()), bytes);
  return all;
}

class MachineReader {
 public:
  MachineReader(const Part& part, const py::dict& d) : part_(part), d_(d) {}

  Machine read() {
    m_.is_double = flag("is_double");
    m_.lanes = flag("lanes") ? lanes_of(m_.is_double) : 1;
    m_.steps = size("steps", 1 << 20);
    m_.second_order = flag("second_order"), m_.store = flag("store"), m_.gradient = flag("gradient");
    m_.wants_rates = flag("wants_rates"), m_.per_step = flag("per_step");
    m_.query_loss = flag("query_loss"), m_.output_grad = flag("output_grad");
    m_.support_step_weights = read_weights(part_.at("support_step_weights"), entry("support_step_weights"));
    if (!m_.support_step_weights.empty() && i64(m_.support_step_weights.size()) != m_.steps)
      part_.at("support_step_weights").refuse("must be one for each step");
    m_.schedule = read_schedule(part_.at("schedule"), entry("schedule"), m_.steps);
    if (m_.checkpointed() && (!m_.gradient || m_.store || m_.steps == 0))
      part_.at("schedule").refuse("needs steps and gradients, and nothing stored");
    m_.rule = read_rule(part_.at("rule"), entry("rule"));
    m_.theta = size("theta"), m_.fixed = size("fixed"), m_.output = size("output");
    m_.state = size("state"), m_.rule_fixed = size("rule_fixed", m_.fixed);
    rows("adapted", 6, [&](const Part& p, const py::tuple& row) {
      machine::Adapted a;
      a.offset = size_at(p, row[0]), a.size = size_at(p, row[1], 1);
      a.per_task = p.boolean(row[2]), a.rate_element = p.boolean(row[3]);
      a.rate_per_task = p.boolean(row[4]), a.rate_per_step = p.boolean(row[5]);
      if (a.offset + a.size > m_.theta) p.refuse("lies outside of theta");
      m_.adapted.push_back(a);
    });
    rows("tables", 4, [&](const Part& p, const py::tuple& row) {
      machine::Table t;
      t.adapted = size_at(p, row[0]), t.rows = size_at(p, row[1], 1, i64(1) << 31);
      t.width = size_at(p, row[2], 1), t.most = size_at(p, row[3], 1, t.rows);
      if (t.adapted >= i64(m_.adapted.size())) p.refuse("is of no adapted parameter");
      const machine::Adapted& a = m_.adapted[t.adapted];
      if (i64(__int128(t.most) * t.width) != a.size || __int128(t.rows) * t.width > MOST_ELEMENTS)
        p.refuse("has a size that cannot be");
      if (a.rate_element) p.refuse("has a rate for each element");
      if (m_.is_table(size_t(t.adapted))) p.refuse("is there twice");
      m_.tables.push_back(t);
    });
    check_tables_come_last();
    rows("others", 6, [&](const Part& p, const py::tuple& row) {
      machine::Fixed f;
      f.offset = size_at(p, row[0]), f.size = size_at(p, row[1], 1), f.per_task = p.boolean(row[2]);
      for (int i = 0; i < 3; ++i) f.grad[i] = size_at(p, row[3 + i], -1);
      if (f.offset + f.size > m_.fixed) p.refuse("lies outside of what is fixed");
      m_.others.push_back(f);
    });
    set("support", m_.support, 0), set("query", m_.query, 1), set("traced_rule", m_.traced_rule, 2);
    if (m_.traced_rule.present && m_.gradient && m_.traced_rule.program.stage_ends.size() < 3)
      part_.at("traced_rule").refuse("has no way back");
    if (m_.traced_rule.present && !m_.rule.plain())
      part_.at("rule").refuse("must be plain with a traced rule");
    if (m_.steps > 0 && !m_.support.present) part_.refuse("has steps, and no support set");
    if ((m_.query_loss || m_.output_grad) && !m_.query.present) part_.refuse("has no query set");
    if (m_.steps > 0 && m_.gradient && m_.runs_back() && m_.support.program.stage_ends.size() < 3)
      part_.refuse("has no Hessian-vector product");
    m_.find_updates();
    return std::move(m_);
  }

  static i64 lanes_of(bool is_double) { return instruction_set().vector_bytes / (is_double ? 8 : 4); }

 private:
  py::object entry(const char* key) const { return part_.entry(d_, key); }
  bool flag(const char* key) const { return part_.at(key).boolean(entry(key)); }
  i64 size(const char* key, i64 most = MOST_ELEMENTS) const {
    return size_at(part_.at(key), entry(key), 0, most);
  }
  double number(const char* key) const {
    const double x = part_.at(key).number(entry(key));
    if (!std::isfinite(x)) part_.at(key).refuse("must be finite");
    return x;
  }
  void check_tables_come_last() const {
    const i64 first = m_.before_tables();
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      const machine::Adapted& a = m_.adapted[p];
      if (m_.is_table(p) ? a.offset < first : !m_.tables.empty() && a.offset + a.size > first)
        part_.at("tables").refuse("must come last in theta, in their order");
    }
    if (!m_.tables.empty() && flag("per_step")) part_.at("tables").refuse("with a support set for each step");
  }
  template <class Body>
  void rows(const char* key, size_t width, const Body& body) const {
    each(part_.at(key), entry(key), width, body);
  }
  template <class Body>
  static void each(const Part& field, py::handle given, size_t width, const Body& body) {
    const py::tuple all = field.list(given);
    for (size_t i = 0; i < all.size(); ++i) {
      const Part row = field.at(i);
      body(row, row.items(all[i], width, width));
    }
  }

  void set(const char* key, machine::Set& to, int which) {
    const Part part = part_.at(key);
    const py::object given = entry(key);
    if (given.is_none()) return;
    const py::dict d = part.dict(given);
    to.present = true;
    machine::Code code;
    code.words = numbers_of<i64>(part.at("words"), part.entry(d, "words"));
    code.numbers = numbers_of<double>(part.at("numbers"), part.entry(d, "numbers"));
    code.stage_counts = numbers_of<i64>(part.at("stages"), part.entry(d, "stages"));
    m_.constants[which] = numbers_of<double>(part.at("constants"), part.entry(d, "constants"));
    const auto sizes = numbers_of<i64>(part.at("sizes"), part.entry(d, "sizes"));
    if (sizes.size() != machine::SPACES) part.at("sizes").refuse("must have a size for each space");
    if (code.stage_counts.size() > 3) part.at("stages").refuse("must be three at most");
    for (int i = 0; i < machine::SPACES; ++i) {
      if (sizes[i] < 0 || sizes[i] > MOST_ELEMENTS) part.at("sizes").refuse("has one that cannot be");
      code.sizes[i] = sizes[i];
    }
    const auto fits = [&](machine::Space s, i64 most) {
      if (code.sizes[int(s)] > most) part.at("sizes").refuse("has one larger than its memory");
    };
    using machine::Space;
    fits(Space::constant, i64(m_.constants[which].size()));
    if (which == 2) {
      for (Space s : {Space::theta, Space::curvature}) fits(s, 3 * m_.theta + m_.state);
      for (Space s : {Space::output, Space::direction}) fits(s, m_.theta + m_.state);
      fits(Space::fixed, m_.fixed - m_.rule_fixed);
      for (Space s : {Space::grad, Space::seed, Space::batch, Space::ints}) fits(s, 0);
    } else {
      for (Space s : {Space::theta, Space::direction, Space::grad, Space::curvature}) fits(s, m_.theta);
      fits(Space::fixed, m_.fixed);
      fits(Space::seed, machine::SEED_OUTPUT + machine::rounded(m_.output));
      fits(Space::output, machine::OUTPUT_START + machine::rounded(m_.output));
    }
    to.program =
        m_.is_double ? machine::decode<double>(code, m_.lanes) : machine::decode<float>(code, m_.lanes);
    const i64 others = code.sizes[int(Space::other)];
    each(part.at("entries"), part.entry(d, "entries"), 4, [&](const Part& p, const py::tuple& row) {
      machine::Entry e;
      e.offset = size_at(p, row[0]), e.size = size_at(p, row[1], 1), e.integer = p.boolean(row[2]);
      e.grad = size_at(p, row[3], -1);
      const i64 own = which == 2 ? m_.state : code.sizes[int(e.integer ? Space::ints : Space::batch)];
      if (e.offset + e.size > own || (which == 2 && e.integer)) p.refuse("lies outside of its space");
      if (e.grad >= 0 && (e.integer || e.grad + e.size > others))
        p.refuse("has a gradient outside of its space");
      to.entries.push_back(e);
    });
    numbered(part, d, to, code.sizes[int(Space::ints)]);
    for (size_t i = 0; i < m_.others.size(); ++i) {
      const i64 at = m_.others[i].grad[which];
      if (at >= 0 && at + m_.others[i].size > others)
        part_.at("others").at(i).refuse("has a gradient outside of its space");
    }
  }

  void numbered(const Part& part, const py::dict& d, machine::Set& to, i64 ints) {
    each(part.at("numbered"), part.entry(d, "numbered"), 4, [&](const Part& p, const py::tuple& row) {
      machine::Numbered n;
      n.table = size_at(p, row[0]), n.wraps = p.boolean(row[1]), n.place = size_at(p, row[2]);
      n.positions = numbers_of<i64>(p, row[3]);
      if (n.table >= i64(m_.tables.size())) p.refuse("is of no table");
      if (n.place + i64(n.positions.size()) > ints) p.refuse("lies outside of its space");
      for (const machine::Entry& e : to.entries)
        if (e.integer && e.offset < n.place + i64(n.positions.size()) && n.place < e.offset + e.size)
          p.refuse("lies where the user's integers do");
      for (const i64 position : n.positions)
        if (position < 0 || position >= ints) p.refuse("reads outside of its space");
      to.numbered.push_back(std::move(n));
    });
  }

  const Part& part_;
  const py::dict& d_;
  Machine m_;
};

inline const Machine& initialised_machine(py::handle self) {
  if (!py::isinstance<Machine>(self)) throw py::type_error("Machine: self must be a Machine");
  auto* const instance = reinterpret_cast<py::detail::instance*>(self.ptr());
  if (!instance->get_value_and_holder().holder_constructed())
    throw py::type_error("Machine: made by Machine(...) only");
  return self.cast<const Machine&>();
}

inline py::object new_machine(const py::args& args, const py::kwargs& kwargs) {
  static const char* const names[] = {"cls", "description"};
  const auto given = arguments("Machine", names, args, kwargs);
  const Part part{"Machine", "description"};
  const py::dict d = part.dict(given[1]);
  return py::cast(MachineReader(part, d).read());
}

template <class S>
class MachineCallReader {
 public:
  using Items = std::vector<py::handle>;
  MachineCallReader(const Machine& m, i64 tasks, Tensors& tensors) : m_(m), tensors_(tensors) {
    call_.tasks = tasks;
  }

  machine::MachineCall<S> read(const Items (&lists)[15], const std::vector<double>& step_weights) {
    static const char* const names[] = {
        "data",    "rate",         "adapted_grad", "adapted",    "grad",  "rate_grad",  "fixed", "fixed_grad",
        "support", "support_grad", "query",        "query_grad", "state", "state_grad", "others"};
    const size_t counts[] = {m_.adapted.size(),
                             m_.adapted.size(),
                             m_.adapted.size(),
                             m_.adapted.size(),
                             m_.adapted.size(),
                             m_.adapted.size(),
                             m_.others.size(),
                             m_.others.size(),
                             m_.support.entries.size(),
                             m_.support.entries.size(),
                             m_.query.entries.size(),
                             m_.query.entries.size(),
                             m_.traced_rule.entries.size(),
                             m_.traced_rule.entries.size(),
                             7};
    for (int i = 0; i < 15; ++i)
      if (!lists[i].empty() && lists[i].size() != counts[i])
        throw std::invalid_argument(std::string("Machine.run: ") + names[i] + " must have " +
                                    std::to_string(counts[i]) + " items or none");
    const auto in = [&](int list, size_t i, i64 count) -> const S* {
      if (lists[list].empty()) return nullptr;
      return static_cast<const S*>(
          tensors_.read(lists[list][i], {names[list], i, "Machine.run"}, count, number()));
    };
    const auto to = [&](int list, size_t i, i64 count) -> S* {
      if (lists[list].empty()) return nullptr;
      return static_cast<S*>(
          tensors_.write(lists[list][i], {names[list], i, "Machine.run"}, count, number()));
    };
    const auto there = [&](const void* p, int list, size_t i) {
      if (!p)
        throw std::invalid_argument(std::string("Machine.run: ") + names[list] + "[" + std::to_string(i) +
                                    "] must be a tensor, got None");
    };
    const i64 T = call_.tasks;
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      const machine::Adapted& a = m_.adapted[p];
      machine::AdaptedCall<S> c;
      const i64 whole = m_.own_size(p), own = a.per_task ? times(T, whole) : whole;
      const i64 rates =
          times(times(a.rate_per_step ? m_.steps : 1, a.rate_per_task ? T : 1), a.rate_element ? a.size : 1);
      c.data = in(0, p, own), there(c.data, 0, p);
      c.rate = in(1, p, rates), there(c.rate, 1, p);
      if (m_.is_table(p) && (!lists[2].empty() || !lists[3].empty()))
        throw std::invalid_argument("Machine.run: what is adapted, or its gradient, with small tables");
      c.adapted_grad = in(2, p, times(T, a.size));
      c.adapted = to(3, p, times(T, a.size));
      c.grad = to(4, p, own);
      c.rate_grad = to(5, p, rates);
      if (c.rate_grad && !m_.wants_rates)
        throw std::invalid_argument("Machine.run: rate_grad was not asked for");
      call_.adapted.push_back(c);
    }
    for (size_t p = 0; p < m_.others.size(); ++p) {
      const machine::Fixed& f = m_.others[p];
      machine::FixedCall<S> c;
      const i64 own = f.per_task ? times(T, f.size) : f.size;
      c.data = in(6, p, own), there(c.data, 6, p);
      c.grad = to(7, p, own);
      call_.others.push_back(c);
    }
    for (int which = 0; which < 2; ++which) {
      const machine::Set& s = which ? m_.query : m_.support;
      auto& entries = which ? call_.query : call_.support;
      const int list = which ? 10 : 8;
      const i64 sets = !which && m_.per_step ? m_.steps : 1;
      for (size_t i = 0; i < s.entries.size(); ++i) {
        const machine::Entry& e = s.entries[i];
        machine::EntryCall<S> c;
        const i64 count = times(times(T, sets), e.size);
        if (!lists[list].empty())
          c.data = tensors_.read(lists[list][i], {names[list], i, "Machine.run"}, count,
                                 e.integer ? Number::i64 : number());
        there(c.data, list, i);
        if (!lists[list + 1].empty() && !lists[list + 1][i].is_none() && e.grad < 0)
          throw std::invalid_argument("Machine.run: a gradient that was not asked for");
        c.grad = to(list + 1, i, count);
        entries.push_back(c);
      }
    }
    for (size_t i = 0; i < m_.traced_rule.entries.size(); ++i) {
      machine::EntryCall<S> c;
      const i64 count = times(T, m_.traced_rule.entries[i].size);
      c.data = in(12, i, count), there(c.data, 12, i);
      c.grad = to(13, i, count);
      call_.state.push_back(c);
    }
    if (!step_weights.empty() && i64(step_weights.size()) != m_.steps + 1)
      throw std::invalid_argument("Machine.run: step_weights must be steps + 1");
    for (double s : step_weights)
      if (!std::isfinite(s)) throw std::invalid_argument("Machine.run: step_weights must be finite");
    call_.step_weights = step_weights;
    call_.task_weights = in(14, 0, T);
    call_.output_grad = in(14, 1, times(T, m_.output));
    call_.task_losses = to(14, 2, T);
    call_.loss = to(14, 3, 1);
    call_.output = to(14, 4, times(T, m_.output));
    call_.numbers = in(14, 5, times(m_.steps, RULE_NUMBERS));
    call_.number_grads = to(14, 6, times(m_.steps, RULE_NUMBERS));
    if (m_.rule.learns() && m_.steps > 0) there(call_.numbers, 14, 5);
    if (call_.number_grads && !m_.learns_numbers())
      throw std::invalid_argument("Machine.run: gradients of numbers that are not learned");
    if (call_.loss && !call_.task_losses)
      throw std::invalid_argument("Machine.run: the loss needs the task losses");
    return std::move(call_);
  }

 private:
  static constexpr Number number() { return sizeof(S) == 4 ? Number::f32 : Number::f64; }
  static i64 times(i64 a, i64 b) {
    i64 product;
    if (__builtin_mul_overflow(a, b, &product) || product > (i64(1) << 60))
      throw std::invalid_argument("Machine.run: tasks are too many for the sizes");
    return product;
  }
  const Machine& m_;
  Tensors& tensors_;
  machine::MachineCall<S> call_;
};

// 0, or 1 where an index was out of range.
inline int run_machine(const py::args& args, const py::kwargs& kwargs) {
  static const char* const names[] = {
      "self",       "tasks",     "threads",    "data",       "rate",         "adapted_grad", "adapted",
      "grad",       "rate_grad", "fixed",      "fixed_grad", "support",      "support_grad", "query",
      "query_grad", "state",     "state_grad", "others",     "step_weights", "poison"};
  const auto given = arguments("Machine.run", names, args, kwargs);
  const Machine& m = initialised_machine(given[0]);
  const auto part = [&](size_t i) { return Part{"Machine.run", names[i]}; };
  const i64 tasks = size_at(part(1), given[1], 1, i64(1) << 40);
  const int threads = int(size_at(part(2), given[2], 1, 1024));
  std::vector<py::handle> lists[15];
  Tensors tensors(8 * (m.adapted.size() + m.others.size() + m.support.entries.size() +
                       m.query.entries.size() + m.traced_rule.entries.size()) +
                  16);
  for (size_t i = 0; i < 15; ++i) {
    part(i + 3).check_list(given[i + 3]);
    lists[i] = tensors.items(given[i + 3]);
  }
  std::vector<double> step_weights;
  for (const py::handle weight : part(18).list(given[18])) step_weights.push_back(part(18).number(weight));
  const bool poison = part(19).boolean(given[19]);
  const auto as = [&](auto zero) {
    using S = decltype(zero);
    const machine::MachineCall<S> call = MachineCallReader<S>(m, tasks, tensors).read(lists, step_weights);
    py::gil_scoped_release release;
    return int(machine::run(m, call, threads, poison));
  };
  return m.is_double ? as(0.0) : as(0.0f);
}

// Not reached for what __new__ has made.
inline Machine no_machine(const py::args&, const py::kwargs&) {
  throw py::type_error("Machine: made by Machine(...) only");
}

inline std::vector<std::string> machine_functions() {
#define FM_NAME(name) #name,
  return {FM_MACHINE_FUNCTIONS(FM_NAME)};
#undef FM_NAME
}

inline void add_machine(py::module_& m) {
  py::class_<machine::Machine>(m, "Machine")
      .def_static("__new__", &new_machine)
      .def(py::init(&no_machine), "Machine(description)")
      .def("run", &run_machine,
           "run(tasks, threads, data, rate, adapted_grad, adapted, grad, rate_grad, fixed, fixed_grad, "
           "support, support_grad, query, query_grad, state, state_grad, others, step_weights, poison)")
      .def_property_readonly("workspace_bytes", [](py::handle self) {
        const auto& machine = initialised_machine(self);
        return machine::workspace(machine) * (machine.is_double ? 8 : 4);
      });
  m.def("machine_functions", &machine_functions,
        "The element-wise functions of the machine, in their order.");
  m.def(
      "machine_lanes", [](bool is_double) { return MachineReader::lanes_of(is_double); },
      "Tasks side by side where the machine has one in every lane.");
}

}  // namespace fm::binding
