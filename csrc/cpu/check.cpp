#include "check.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "layers.h"

namespace fm {
namespace {

[[noreturn]] void refuse(const std::string& field, const std::string& what) {
  throw std::invalid_argument("Plan: " + field + " " + what);
}

void require(bool ok, const std::string& field, const char* what) {
  if (!ok) refuse(field, what);
}

void in_range(const std::string& field, i64 value, i64 least, i64 most) {
  if (value < least || value > most)
    refuse(field, "must be from " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
                      std::to_string(value));
}

void finite(const std::string& field, double value) {
  if (!std::isfinite(value)) refuse(field, "must be finite, got " + std::to_string(value));
}

std::string item(const char* field, size_t i) { return std::string(field) + "[" + std::to_string(i) + "]"; }

void check_value(const std::string& field, const Value& v) {
  const i64 sizes[] = {v.rows, v.cols, v.height, v.width};
  const char* const names[] = {".rows", ".cols", ".height", ".width"};
  for (int i = 0; i < 4; ++i) in_range(field + names[i], sizes[i], 1, MOST_EXAMPLES - 1);
  require(v.rows * v.cols <= MOST_ELEMENTS, field, "is too large");
  require(v.height * v.width == v.rows, field + ".rows", "must be height * width");
}

void check_param(const std::string& field, const Param& p) {
  const i64 sizes[] = {p.rows, p.cols, p.taps};
  const char* const names[] = {".rows", ".cols", ".taps"};
  for (int i = 0; i < 3; ++i) in_range(field + names[i], sizes[i], 1, MOST_EXAMPLES - 1);
  require(p.rows * p.cols <= MOST_ELEMENTS, field, "is too large");
  require(p.cols % p.taps == 0, field + ".taps", "must divide the columns");
  require(p.matrix || (p.rows == 1 && p.taps == 1), field, "has rows or taps, but is no matrix");
  require(!p.constant || (!p.adapted && !p.per_task), field + ".constant", "excludes adapted and per_task");
  require(p.adapted || (!p.rate_element && !p.rate_per_task && !p.rate_per_step), field,
          "has a rate, but is not adapted");
}

void check_constants(const std::string& field, const Layer& layer, const Rules& rule) {
  require(layer.given_constants >= rule.least_constants && layer.given_constants <= rule.most_constants,
          field + ".constants", "are not as many as its kind takes");
  for (int i = 0; i < MOST_CONSTANTS; ++i) {
    const double c = layer.constants[i];
    const bool whole = c >= 0 && c < double(MOST_EXAMPLES) && c == std::floor(c);
    if (rule.constants[i] == Constant::size)
      require(whole, field + item(".constants", size_t(i)), "must be a whole number from 0 to 2^31 - 1");
    if (rule.constants[i] == Constant::epsilon)
      require(std::isfinite(c) && c >= 0, field + item(".constants", size_t(i)),
              "must be finite and not negative");
  }
}

void check_layer(const Plan& plan, const std::string& field, const Layer& layer) {
  const Rules rule = rules(layer.kind);
  const int params = int(plan.params.size());
  check_constants(field, layer, rule);
  require((layer.function != Function::none) == rule.function, field + ".function",
          rule.function ? "must be one" : "must be none");
  require(!layer.adaptive || rule.may_be_adaptive, field + ".function", "must be none");
  for (int j = 0; j < 2; ++j)
    require((layer.inputs[j] >= 0) == (j < rule.inputs), field + ".inputs",
            "are not as many as its kind takes");
  for (int j = 0; j < int(layer.params.size()); ++j) {
    const int p = layer.params[j];
    const std::string at = field + item(".params", size_t(j));
    require(p >= -1 && p < params, at, "is no parameter");
    require(p < 0 || j < rule.params, at, "is more than its kind takes");
    require(p >= 0 || j >= rule.required_params, at, "must be a parameter");
    require(p < 0 || plan.params[p].constant == (j >= rule.params - rule.buffers), at,
            "must be a constant for running statistics, and for nothing else");
  }
}

// Every value is written once, before it is read, and read before it ends.
void check_order(const Plan& plan) {
  const int count = int(plan.values.size());
  std::vector<bool> written(plan.values.size(), false), read = written;
  std::vector<int> used_by(plan.params.size(), -1);  // kind, whose weight it is
  written[0] = true;
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    const Layer& layer = plan.layers[i];
    const std::string field = item("layers", i);
    for (int in : layer.inputs) {
      if (in < 0) continue;
      require(in < count && written[in], field + ".inputs", "must be written by an earlier layer");
      read[in] = true;
    }
    require(layer.output >= 0 && layer.output < count, field + ".output", "is no value");
    require(!written[layer.output], field + ".output", "is written twice");
    for (int in : layer.inputs) require(in < layer.output, field + ".output", "must come after the inputs");
    written[layer.output] = true;
    for (int j = 0; j < int(layer.params.size()); ++j) {
      if (layer.params[j] < 0) continue;
      int& kind = used_by[layer.params[j]];
      const int own = plan.params[layer.params[j]].matrix ? int(layer.kind) : MOST_LAYERS;
      require(kind < 0 || kind == own, field + item(".params", size_t(j)),
              "is the weight of another kind of layer");
      kind = own;
    }
  }
  read[plan.output] = true;
  for (int i = 0; i < count; ++i) {
    require(written[i], item("values", size_t(i)), "is written by no layer");
    require(read[i], item("values", size_t(i)), "is read by no layer");
  }
  for (size_t p = 0; p < used_by.size(); ++p)
    require(used_by[p] >= 0, item("params", p), "is read by no layer");
}

void check_loss(const Plan& plan, const std::string& field, const LossSpec& loss, i64 examples) {
  if (loss.kind == LossKind::none) return;
  require(examples > 0, field, "must be None where there are no examples");
  finite(field + ".beta", loss.beta);
  require(loss.beta >= 0, field + ".beta", "must not be negative");
  require(loss.label_smoothing >= 0 && loss.label_smoothing <= 1, field + ".label_smoothing",
          "must be from 0 to 1");
  const bool classes = loss.kind == LossKind::cross_entropy;
  require(classes || !loss.class_indices, field + ".class_indices", "is for cross_entropy alone");
  const Value& out = plan.values[plan.output];
  require(!classes || out.rows == 1 || out.channels, field + ".kind",
          "needs one row of classes for each position");
}

void check_options(const Plan& plan) {
  const Options& o = plan.options;
  in_range("options.steps", o.steps, 0, MOST_STEPS);
  in_range("options.support", o.support, 0, MOST_EXAMPLES - 1);
  in_range("options.query", o.query, 0, MOST_EXAMPLES - 1);
  require(o.support > 0 || o.query > 0, "options.query", "must be positive where there is no support set");
  require(o.steps == 0 || (o.support > 0 && o.loss.kind != LossKind::none), "options.steps",
          "need a support set and its loss");
  const auto& weights = o.support_step_weights;
  require(weights.empty() || i64(weights.size()) == o.steps, "options.support_step_weights",
          "must be one for each step");
  require(o.schedule.empty() || (o.gradient && !o.store && o.steps > 0), "options.schedule",
          "needs steps and gradients, and nothing stored");
  require(!o.support_per_step || o.steps > 0, "options.support_per_step", "needs steps");
  require(!o.wants_rates || (o.gradient && o.steps > 0), "options.wants_rates", "needs gradients and steps");
  require(!o.wants_support_x || (o.gradient && o.support > 0), "options.wants_support_x",
          "needs gradients and a support set");
  require(!o.wants_query_x || (o.gradient && o.query > 0), "options.wants_query_x",
          "needs gradients and a query set");
  check_loss(plan, "options.loss", o.loss, o.support);
  check_loss(plan, "options.query_loss", o.query_loss, o.query);
  for (size_t p = 0; p < plan.params.size(); ++p)
    require(o.steps > 0 || !plan.params[p].rate_per_step, item("params", p) + ".rate_per_step",
            "needs steps");
}

// The values of a batch and what layers keep beside them, with room for padding.
void check_sizes(const Plan& plan) {
  const i64 examples = std::max(plan.options.support, plan.options.query);
  i64 values = 0, params = 0;
  for (const Value& v : plan.values)
    values = plus(values, times(examples, times(v.rows, 2 * plan.value_ld(v.cols))));
  for (const Param& p : plan.params) params = plus(params, times(plan.padded(p.rows), plan.padded(p.cols)));
  require(values <= MOST_ELEMENTS * 16, "values", "are too large for so many examples");
  require(params <= MOST_ELEMENTS * 16, "params", "are too large");
}

}  // namespace

Rules rules(Kind kind) {
#define FM_CASE(kind) \
  case Kind::kind:    \
    return kind::RULES;
  switch (kind) { FM_LAYER_KINDS(FM_CASE) }
#undef FM_CASE
  throw std::invalid_argument("layer program: a layer kind that is none");
}

const char* name_of(Kind kind) {
#define FM_CASE(kind) \
  case Kind::kind:    \
    return #kind;
  switch (kind) { FM_LAYER_KINDS(FM_CASE) }
#undef FM_CASE
  throw std::invalid_argument("layer program: a layer kind that is none");
}

i64 plus(i64 a, i64 b) {
  i64 sum;
  if (__builtin_add_overflow(a, b, &sum)) refuse("values", "are too large");
  return sum;
}

i64 times(i64 a, i64 b) {
  i64 product;
  if (__builtin_mul_overflow(a, b, &product)) refuse("values", "are too large");
  return product;
}

void check(const Plan& plan) {
  const size_t most = size_t(MOST_LAYERS);
  require(!plan.values.empty() && plan.values.size() <= most, "values", "are none or too many");
  require(!plan.layers.empty() && plan.layers.size() <= most, "layers", "are none or too many");
  require(!plan.params.empty() && plan.params.size() <= most, "params", "are none or too many");
  require(plan.output > 0 && plan.output < int(plan.values.size()), "output",
          "is no value that a layer writes");
  for (size_t i = 0; i < plan.values.size(); ++i) check_value(item("values", i), plan.values[i]);
  for (size_t i = 0; i < plan.params.size(); ++i) check_param(item("params", i), plan.params[i]);
  for (size_t i = 0; i < plan.layers.size(); ++i) check_layer(plan, item("layers", i), plan.layers[i]);
  check_order(plan);
  check_options(plan);
  check_sizes(plan);
}

void check_layers(const Plan& plan) {
  for (size_t i = 0; i < plan.layers.size(); ++i) try {
      needs(plan, plan.layers[i], 1);
    } catch (const std::invalid_argument& error) {
      refuse(item("layers", i) + " (" + name_of(plan.layers[i].kind) + "):", error.what());
    }
}

}  // namespace fm
