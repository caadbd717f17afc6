#include "plan.h"

#include <algorithm>
#include <utility>

#include "check.h"
#include "layers.h"

namespace fm {

namespace {

// Weights up to this size stay in the first-level cache from use to use.
constexpr i64 NEAR_BYTES = 64 << 10;

// Values up to this size stay in a core's second-level cache from use to use.
constexpr i64 KEPT_BYTES = 1 << 20;

Geometry geometry(const Plan& plan, i64 examples) {
  Geometry g;
  g.examples = examples;
  std::vector<bool> written(plan.values.size(), false), recomputed = written;
  written[0] = true;
  for (const Layer& layer : plan.layers) {
    written[layer.output] = true;  // what lay between two layers that are now one is not
    if (layer.recomputes >= 0) recomputed[layer.inputs[0]] = true;
  }
  for (size_t i = 0; i < plan.values.size(); ++i) {
    const i64 size = examples * plan.values[i].rows * plan.values[i].ld;
    if (!written[i] || (recomputed[i] && size * (plan.is_double ? 8 : 4) > KEPT_BYTES)) {
      g.offset.push_back(-1);
      continue;
    }
    g.offset.push_back(g.size);
    g.size += size;
  }
  g.size_with_state = g.size;
  for (const Layer& layer : plan.layers) {
    g.state.push_back(g.size_with_state);
    if (examples > 0) g.size_with_state += plan.padded(needs(plan, layer, examples).state);
  }
  return g;
}

i64 largest_temporary(const Plan& plan, i64 examples) {
  i64 most = 0;
  if (examples > 0)
    for (const Layer& layer : plan.layers) most = std::max(most, needs(plan, layer, examples).temporary);
  return plan.padded(most);
}

}  // namespace

i64 Plan::value_ld(i64 cols) const {
  const i64 lines = padded(cols) / lane;
  // Rows a multiple of a large power of two apart would crowd into a few cache sets.
  return (lines > 4 && lines % 2 == 0 ? lines + 1 : lines) * lane;
}

// Only convolutions read rows that are not padded.
void Plan::lay_out_input() {
  Value& in = values[0];
  const bool dense = std::all_of(layers.begin(), layers.end(), [](const Layer& layer) {
    return layer.kind == Kind::conv2d || (layer.inputs[0] != 0 && layer.inputs[1] != 0);
  });
  input_ld = dense && output != 0 ? in.cols : in.ld;
  alias_input = (dense || in.cols % lane == 0) && (!in.channels || in.rows == 1 || in.cols == 1);
  if (alias_input) input_ld = in.cols;
}

// A wide linear layer of the support inputs, where these and the update rule are such that its
// changes have low rank.
void Plan::choose_input_layer() {
  const Options& o = options;
  if (checkpointed() || (!o.support_step_weights.empty() && !o.second_order)) return;
  if (o.steps == 0 || o.support == 0 || o.support_per_step || tied || !plain_rule() || o.wants_support_x ||
      o.wants_query_x)
    return;
  for (const Layer& layer : layers) {
    if (layer.kind != Kind::linear || layer.inputs[0] != 0) continue;
    const Param& w = params[layer.weight()];
    const bool large = w.numel() * (is_double ? 8 : 4) > NEAR_BYTES,
               wide = 2 * o.support * values[0].rows <= w.cols;
    if (w.adapted && !w.rate_element && !w.narrow && large && wide) {
      input_layer = layer.index;
      return;
    }
  }
}

i64 Plan::input_layer_size() const {
  if (input_layer < 0) return 0;
  const i64 rows = options.support * values[0].rows, queries = options.query * values[0].rows,
            product = rows * values[layers[input_layer].output].ld;
  return plus(times(rows + queries, padded(rows)), times(5 + options.steps, product));
}

void Plan::finish() {
  lane = is_double ? 8 : 16;
  check(*this);
  const int known = int(params.size());
  for (Value& v : values) v.ld = value_ld(v.cols);
  for (Layer& layer : layers)
    if (layer.kind == Kind::linear)
      params[layer.weight()].narrow = params[layer.weight()].rows <= NARROW_ROWS;
  check_fused(*this);
  for (Layer& layer : layers)  // where it is cheap
    if (layer.recomputes >= 0 && !conv2d::gathers(*this, layers[layer.recomputes])) layer.recomputes = -1;
  check_layers(*this);
  std::vector<int> uses(params.size(), 0);
  for (const Layer& layer : layers)
    for (int p : layer.params)
      if (p >= 0 && !params[p].constant && ++uses[p] > 1) tied = true;
  for (size_t i = 0; i < layers.size(); ++i) layers[i].index = int(i);
  lay_out_input();
  require(values[output].from_params, "the output depends on no parameter");
  const bool input_gradient = options.wants_support_x || options.wants_query_x;
  for (const Layer& layer : layers)
    if (rules(layer.kind).weight && !params[layer.weight()].narrow &&
        (input_gradient || values[layer.inputs[0]].from_params))
      params[layer.weight()].mirrored = true;
  choose_input_layer();
  for (Param& p : params) {
    p.size = !p.matrix ? padded(p.cols) : p.narrow ? p.rows * padded(p.cols) : p.cols * padded(p.rows);
    p.mirror_offset = mirror_size;
    p.mirror_size = p.mirrored ? p.taps * p.rows * padded(p.channels()) : 0;
    mirror_size += p.mirror_size;
  }
  // The input layer's weight comes last: theta_1, theta_2, .. end before it.
  const int last = input_layer < 0 ? -1 : layers[input_layer].weight();
  for (int i = 0; i < known; ++i)
    if (i != last) params[i].offset = std::exchange(set_size, set_size + params[i].size);
  at.theta_stride = set_size;
  if (last >= 0) params[last].offset = std::exchange(set_size, set_size + params[last].size);
  range_sums = set_size;
  if (options.wants_rates)
    for (Param& p : params)
      if (p.adapted) {
        p.rate_sum_size =
            times(p.rate_per_step ? std::max<i64>(options.steps, 1) : 1, p.rate_element ? p.size : lane);
        i64& end = p.rate_per_task ? task_sums : range_sums;
        p.rate_sum_offset = end;
        end = plus(end, p.rate_sum_size);
      }

  number_sum_offset = range_sums;
  if (options.rule.learns()) range_sums = plus(range_sums, times(options.steps, RULE_NUMBERS));

  support = geometry(*this, options.support);
  query = geometry(*this, options.query);
  const i64 K = options.steps, kept = options.store && options.gradient ? K : (K > 0 ? 1 : 0);
  i64 end = 0;
  auto take = [&end](i64 n) { return std::exchange(end, plus(end, n)); };
  at.mirror_stride = options.store ? mirror_size : 0;
  at.theta = take(plus(set_size, times(checkpointed() ? 2 : K, at.theta_stride)));
  at.theta_mirror = take(times(mirror_size, options.store ? K + 1 : 2));
  at.value_stride = kept > 1 ? support.size_with_state : 0;
  at.delta_stride = kept > 1 ? support.size : 0;
  at.values = take(times(kept, support.size_with_state));
  at.deltas = take(times(kept, support.size));
  at.query_values = take(query.size_with_state);
  at.query_deltas = take(query.size);
  const bool tangent = options.gradient && options.second_order && K > 0;
  at.tangents = take(tangent ? support.size_with_state : 0);
  at.tangent_deltas = take(tangent ? support.size : 0);
  at.gradient = take(set_size);
  at.direction = take(options.gradient ? set_size : 0);
  at.direction_mirror = take(tangent ? mirror_size : 0);
  at.lambda = take(options.gradient ? set_size : 0);
  const i64 states = options.rule.states(), ruled = plain_rule() || K == 0 ? 0 : 1;
  at.rule_stride = ruled && keeps_steps() ? set_size : 0;
  at.rule_gradients = take(ruled * (keeps_steps() ? times(K, set_size) : set_size));
  at.rule_states = take(ruled * times(keeps_steps() ? K + 1 : 2, times(states, set_size)));
  at.checkpoint_stride = plus(at.theta_stride, ruled * times(states, set_size));
  at.checkpoints = take(times(options.schedule.places, at.checkpoint_stride));
  at.mbar = take(ruled && options.gradient ? times(states, set_size) : 0);
  at.clipped = take(ruled && options.rule.clips() ? set_size : 0);
  at.factors = take(ruled && options.rule.clips() ? times(K + 2, lane) : 0);
  at.update_stride = keeps_updates() ? at.theta_stride : 0;
  at.updates = take(keeps_updates() ? times(K, at.theta_stride) : 0);
  at.rates = take(set_size);
  at.task_sums = take(task_sums);
  temporary = std::max(largest_temporary(*this, options.support), largest_temporary(*this, options.query));
  at.temporary = take(temporary);
  at.input_layer = take(input_layer_size());
  at.total = end;
  times(end, 2 * 8);  // bytes, too
}

}  // namespace fm
