// From the lists and numbers of `_C.Plan(...)` to a plan. Whatever is no number, name or list here
// is refused by name; what the numbers mean is checked by Plan::finish.
#pragma once

#include <cmath>

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/plan.h"

namespace fm::binding {

namespace py = pybind11;

// One place in what was given, for messages: "Plan: layers[3].inputs". Names are put together when
// they are needed.
struct Part {
  const char* who;
  const char* field;
  const Part* of = nullptr;  // the whole that this is a part of
  long index = -1;           // the item of that whole
  Part at(std::size_t i) const { return {who, "", this, long(i)}; }
  Part at(const char* part) const { return {who, part, this}; }
  std::string name() const {
    if (index >= 0) return of->name() + "[" + std::to_string(index) + "]";
    return of ? of->name() + "." + field : field;
  }
  [[noreturn]] void refuse(const std::string& what) const {
    throw std::invalid_argument(std::string(who) + ": " + name() + " " + what);
  }
  template <class T>
  T read(py::handle given, const char* what) const {
    try {
      return given.cast<T>();
    } catch (const py::cast_error&) {
      refuse(std::string("must be ") + what);
    }
  }
  i64 integer(py::handle given) const {
    if (!PyLong_Check(given.ptr()) || PyBool_Check(given.ptr())) refuse_type(given, "an integer");
    return read<i64>(given, "an integer of 64 bits");
  }
  bool boolean(py::handle given) const {
    if (!PyBool_Check(given.ptr())) refuse_type(given, "a bool");
    return given.ptr() == Py_True;
  }
  double number(py::handle given) const {
    if ((!PyFloat_Check(given.ptr()) && !PyLong_Check(given.ptr())) || PyBool_Check(given.ptr()))
      refuse_type(given, "a number");
    return read<double>(given, "a number");
  }
  std::string text(py::handle given) const {
    if (!PyUnicode_Check(given.ptr())) refuse_type(given, "a string");
    return read<std::string>(given, "a string");
  }
  // A tuple or list of `least` to `most` items.
  py::tuple items(py::handle given, std::size_t least, std::size_t most) const {
    if (!PyTuple_Check(given.ptr()) && !PyList_Check(given.ptr())) refuse_type(given, "a tuple or a list");
    py::tuple all(py::reinterpret_borrow<py::object>(given));
    if (all.size() < least || all.size() > most)
      refuse("must have " + std::to_string(least) + (least == most ? "" : " to " + std::to_string(most)) +
             " items, got " + std::to_string(all.size()));
    return all;
  }
  void check_list(py::handle given) const {
    if (!PyList_Check(given.ptr())) refuse_type(given, "a list");
  }
  // What a list holds now.
  py::tuple list(py::handle given) const {
    check_list(given);
    return py::tuple(py::reinterpret_borrow<py::object>(given));
  }
  py::dict dict(py::handle given) const {
    if (!PyDict_Check(given.ptr())) refuse_type(given, "a dict");
    return py::reinterpret_borrow<py::dict>(given);
  }
  py::object entry(const py::dict& of, const char* key) const {
    if (!of.contains(key)) refuse(std::string("lacks '") + key + "'");
    return of[key];
  }

 private:
  [[noreturn]] void refuse_type(py::handle given, const char* what) const {
    throw py::type_error(std::string(who) + ": " + name() + " must be " + what + ", got " +
                         Py_TYPE(given.ptr())->tp_name);
  }
};

template <class E>
E named(const Part& part, const std::string& name, const std::vector<std::pair<const char*, E>>& table) {
  for (const auto& [key, value] : table)
    if (name == key) return value;
  part.refuse("is unknown: '" + name.substr(0, 100) + "'");
}

inline Kind kind_named(const Part& part, const std::string& name) {
#define FM_ENTRY(kind) {#kind, Kind::kind},
  return named<Kind>(part, name, {FM_LAYER_KINDS(FM_ENTRY)});
#undef FM_ENTRY
}

inline Function function_named(const Part& part, const std::string& name) {
#define FM_ENTRY(function, formula) {#function, Function::function},
  return named<Function>(part, name, {FM_FUNCTIONS(FM_ENTRY)});
#undef FM_ENTRY
}

inline LossSpec read_loss(const Part& part, py::handle given) {
  LossSpec spec;
  if (given.is_none()) return spec;
  using L = LossKind;
  const py::dict d = part.dict(given);
  const auto boolean = [&](const char* key) { return part.at(key).boolean(part.entry(d, key)); };
  const auto number = [&](const char* key) { return part.at(key).number(part.entry(d, key)); };
  spec.kind = named<L>(part.at("kind"), part.at("kind").text(part.entry(d, "kind")),
                       {{"mse", L::mse},
                        {"l1", L::l1},
                        {"smooth_l1", L::smooth_l1},
                        {"huber", L::huber},
                        {"cross_entropy", L::cross_entropy},
                        {"bce_with_logits", L::bce_with_logits}});
  spec.sum = boolean("sum"), spec.normalise_sum = boolean("normalise_sum");
  spec.class_indices = boolean("class_indices");
  spec.beta = number("beta"), spec.label_smoothing = number("label_smoothing");
  spec.ignore_index = part.at("ignore_index").integer(part.entry(d, "ignore_index"));
  return spec;
}

inline Value read_value(const Part& part, py::handle given) {
  const auto v = part.items(given, 6, 6);
  Value value;
  value.rows = part.at("rows").integer(v[0]), value.cols = part.at("cols").integer(v[1]);
  value.height = part.at("height").integer(v[2]), value.width = part.at("width").integer(v[3]);
  value.channels = part.at("channels").boolean(v[4]);
  value.from_params = part.at("from_params").boolean(v[5]);
  return value;
}

// A number that names a value or a parameter: -1 for none.
inline int read_index(const Part& part, py::handle given) {
  const i64 index = part.integer(given);
  if (index < -1 || index > (i64(1) << 30)) part.refuse("must be an index, got " + std::to_string(index));
  return int(index);
}

// What is done together with neighbours: a dict, of which any entry may be missing.
inline void read_fused(const Part& part, py::handle given, Layer& layer) {
  for (const auto& [key, value] : part.dict(given)) {
    const std::string name = part.text(key);
    const Part at = part.at(name.c_str());
    if (name == "relu_out")
      layer.relu_out = at.boolean(value);
    else if (name == "relu_in")
      layer.relu_in = at.boolean(value);
    else if (name == "bias_cancels")
      layer.bias_cancels = at.boolean(value);
    else if (name == "recomputes")
      layer.recomputes = read_index(at, value);
    else if (name == "pool") {
      const auto sizes = at.items(value, 2, 2);
      layer.pool_h = at.at(std::size_t(0)).integer(sizes[0]);
      layer.pool_w = at.at(std::size_t(1)).integer(sizes[1]);
    } else if (name == "adds") {
      const auto flags = at.items(value, 1, 2);
      for (std::size_t j = 0; j < flags.size(); ++j) layer.adds[j] = at.at(j).boolean(flags[j]);
    } else {
      part.refuse("has an unknown entry '" + name.substr(0, 100) + "'");
    }
  }
}

inline Layer read_layer(const Part& part, py::handle given) {
  const auto l = part.items(given, 7, 7);
  Layer layer;
  layer.kind = kind_named(part.at("kind"), part.at("kind").text(l[0]));
  const std::string function = part.at("function").text(l[1]);
  layer.adaptive = function == "adaptive";
  if (!layer.adaptive && !function.empty()) layer.function = function_named(part.at("function"), function);
  const auto constants = part.at("constants").items(l[2], 0, layer.constants.size());
  for (std::size_t i = 0; i < constants.size(); ++i)
    layer.constants[i] = part.at("constants").at(i).number(constants[i]);
  layer.given_constants = int(constants.size());
  const auto inputs = part.at("inputs").items(l[3], 1, std::size(layer.inputs));
  for (std::size_t i = 0; i < inputs.size(); ++i)
    layer.inputs[i] = read_index(part.at("inputs").at(i), inputs[i]);
  layer.output = read_index(part.at("output"), l[4]);
  const auto params = part.at("params").items(l[5], 0, layer.params.size());
  for (std::size_t i = 0; i < params.size(); ++i)
    layer.params[i] = read_index(part.at("params").at(i), params[i]);
  read_fused(part.at("fused"), l[6], layer);
  return layer;
}

inline Param read_param(const Part& part, py::handle given) {
  const auto p = part.items(given, 10, 10);
  Param param;
  param.rows = part.at("rows").integer(p[0]), param.cols = part.at("cols").integer(p[1]);
  param.taps = part.at("taps").integer(p[2]);
  bool* const flags[] = {&param.matrix,       &param.constant,      &param.per_task,     &param.adapted,
                         &param.rate_element, &param.rate_per_task, &param.rate_per_step};
  const char* const names[] = {"matrix",       "constant",      "per_task",     "adapted",
                               "rate_element", "rate_per_task", "rate_per_step"};
  for (int i = 0; i < 7; ++i) *flags[i] = part.at(names[i]).boolean(p[3 + i]);
  return param;
}

inline std::vector<std::string> rule_numbers() {
#define FM_NAME(name) #name,
  return {FM_RULE_NUMBERS(FM_NAME)};
#undef FM_NAME
}

// kind, nesterov, centered; numbers, on and learned by the order of `_C.rule_numbers()`
inline Rule read_rule(const Part& part, py::handle given) {
  const py::dict d = part.dict(given);
  Rule rule;
  const Part in_kind = part.at("kind");
  const std::string kind = in_kind.text(part.entry(d, "kind"));
  bool known = false;
#define FM_ENTRY(name) \
  if (kind == #name) rule.kind = RuleKind::name, known = true;
  FM_RULE_KINDS(FM_ENTRY)
#undef FM_ENTRY
  if (!known) in_kind.refuse("is no update rule: '" + kind.substr(0, 100) + "'");
  rule.nesterov = part.at("nesterov").boolean(part.entry(d, "nesterov"));
  rule.centered = part.at("centered").boolean(part.entry(d, "centered"));
  const auto items = [&](const char* key) {
    return part.at(key).items(part.entry(d, key), RULE_NUMBERS, RULE_NUMBERS);
  };
  const py::tuple numbers = items("numbers"), on = items("on"), learned = items("learned");
  for (int i = 0; i < RULE_NUMBERS; ++i) {
    rule.numbers[i] = part.at("numbers").at(i).number(numbers[i]);
    rule.on[i] = part.at("on").at(i).boolean(on[i]);
    rule.learned[i] = part.at("learned").at(i).boolean(learned[i]);
    if (!std::isfinite(rule.numbers[i])) part.at("numbers").at(i).refuse("must be finite");
    if (rule.learned[i] && !rule.on[i]) part.at("learned").at(i).refuse("is not on");
  }
  return rule;
}

// (kind, at, to) of each action, none for no checkpoints: fastmeta/backends/_checkpoints.py.
inline Schedule read_schedule(const Part& part, py::handle given, i64 steps) {
  Schedule schedule;
  const py::tuple all = part.list(given);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const Part row = part.at(i);
    const py::tuple action = row.items(all[i], 3, 3);
    const i64 kind = row.integer(action[0]);
    if (kind < 0 || kind >= ACTION_KINDS) row.refuse("is no action");
    schedule.actions.push_back({ActionKind(kind), row.integer(action[1]), row.integer(action[2])});
  }
  if (!schedule.empty() && !schedule.complete(steps)) part.refuse("does not go over all steps");
  return schedule;
}

// Finite numbers.
inline std::vector<double> read_weights(const Part& part, py::handle given) {
  std::vector<double> weights;
  for (const py::handle weight : part.list(given)) weights.push_back(part.number(weight));
  for (const double weight : weights)
    if (!std::isfinite(weight)) part.refuse("must be finite");
  return weights;
}

inline Options read_options(const Part& part, const py::dict& given) {
  Options o;
  const auto integer = [&](const char* key) { return part.at(key).integer(part.entry(given, key)); };
  const auto boolean = [&](const char* key) { return part.at(key).boolean(part.entry(given, key)); };
  o.steps = integer("steps"), o.support = integer("support"), o.query = integer("query");
  o.second_order = boolean("second_order"), o.store = boolean("store"), o.gradient = boolean("gradient");
  o.support_per_step = boolean("support_per_step"), o.wants_rates = boolean("wants_rates");
  o.wants_support_x = boolean("wants_support_x"), o.wants_query_x = boolean("wants_query_x");
  o.support_step_weights =
      read_weights(part.at("support_step_weights"), part.entry(given, "support_step_weights"));
  if (o.steps < 0 || o.steps > MOST_STEPS) part.at("steps").refuse("is out of range");
  o.schedule = read_schedule(part.at("schedule"), part.entry(given, "schedule"), o.steps);
  o.rule = read_rule(part.at("rule"), part.entry(given, "rule"));
  o.loss = read_loss(part.at("loss"), part.entry(given, "loss"));
  o.query_loss = read_loss(part.at("query_loss"), part.entry(given, "query_loss"));
  return o;
}

// values: (rows, cols, height, width, channels, from_params); layers: (kind, function, constants,
// inputs, output, params, fused), -1 for none; params: (rows, cols, taps, matrix, constant,
// per_task, adapted, rate_element, rate_per_task, rate_per_step)
inline Plan make_plan(py::handle is_double, py::handle values, py::handle layers, py::handle params,
                      py::handle output, py::handle options) {
  Plan plan;
  const auto part = [](const char* name) { return Part{"Plan", name}; };
  const auto all = [&](const char* name, py::handle given) {
    return part(name).items(given, 1, std::size_t(MOST_LAYERS));
  };
  plan.is_double = part("is_double").boolean(is_double);
  const py::tuple v = all("values", values), l = all("layers", layers), p = all("params", params);
  const Part in_v = part("values"), in_l = part("layers"), in_p = part("params");
  for (std::size_t i = 0; i < v.size(); ++i) plan.values.push_back(read_value(in_v.at(i), v[i]));
  for (std::size_t i = 0; i < l.size(); ++i) plan.layers.push_back(read_layer(in_l.at(i), l[i]));
  for (std::size_t i = 0; i < p.size(); ++i) plan.params.push_back(read_param(in_p.at(i), p[i]));
  plan.output = read_index(part("output"), output);
  const Part in_options = part("options");
  plan.options = read_options(in_options, in_options.dict(options));
  plan.finish();
  return plan;
}

}  // namespace fm::binding
