// Where everything lies in the scratch memory of a worker, in elements.
#pragma once

#include <algorithm>

#include "machine.h"

namespace fm::machine {

struct Layout {
  i64 tiles, work, once, kept, theta, grad, lambda, direction, updates, alphas;
  // of rules that are not plain: as in csrc/cpu/plan.h
  i64 rule_gradients, rule_states, mbar, clipped, factors, rule_stride;
  // of a traced rule: what goes in, comes out, its cotangents and its gradients, as csrc/cpu/machine/
  // traced_rule.h says
  i64 rule_in, rule_out, rule_cotangents, rule_found, rule_once, rule_kept, rule_kept_stride;
  i64 fixed, batch[2], ints[2], seed, other, output, others_sum;
  i64 kept_stride, update_stride;
  i64 checkpoints, theta_stride, state_stride;  // a checkpoint: theta, then the state of the rule
  i64 total;
  // of the caller: constants of both programs, shared parameters, and sums over tasks
  i64 constants[3], shared_fixed, shared_theta, shared;
  i64 sum_theta, sum_fixed, sum_rates, sum_numbers, sums;
  // of the caller, for each task: of every table the rows' numbers (first how many), and their
  // gradients
  i64 record;
  std::vector<i64> record_numbers, record_values;
  std::vector<i64> rate_sums;  // of each adapted parameter, from sum_rates on
};

inline i64 size_of(const Set& set, Space space) { return set.present ? set.program.sizes[int(space)] : 0; }

inline Layout layout_of(const Machine& m, size_t element) {
  Layout at{};
  i64 next = 0;
  const auto take = [&](i64 n) {
    const i64 here = next;
    next += rounded(n) + 2 * SLACK;
    return here;
  };
  const auto most = [&](Space s) {
    return std::max({size_of(m.support, s), size_of(m.query, s), size_of(m.traced_rule, s)});
  };
  const i64 L = m.lanes, per_i64 = i64(sizeof(i64) / element);
  const i64 steps = m.gradient ? m.steps : std::min<i64>(m.steps, 1);
  at.tiles = take(std::max({m.support.program.tiles, m.query.program.tiles, m.traced_rule.program.tiles}));
  at.work = take(most(Space::work) * L);
  at.once = take((size_of(m.support, Space::once)) * L + size_of(m.query, Space::once) * L + SLACK);
  at.kept_stride = rounded(most(Space::kept) * L) + SLACK;
  // with checkpoints what a step keeps outlives the query's pass
  at.kept = take(at.kept_stride * (m.store && m.gradient ? std::max<i64>(m.steps, 1) : 1 + m.checkpointed()));
  at.theta_stride = rounded(m.theta * L + SLACK);
  at.theta = take((m.keeps_steps() ? m.steps + 1 : 3) * at.theta_stride);
  at.grad = take(m.theta * L);
  at.lambda = take(m.theta * L);
  at.direction = take(m.theta * L);
  const i64 ruled = m.plain_rule() || m.steps == 0 ? 0 : 1, states = m.rule.states();
  at.rule_stride = rounded(m.theta * L + SLACK);
  at.rule_gradients = take(ruled * (m.keeps_steps() ? m.steps : 1) * at.rule_stride);
  const bool traced = m.traced_rule.present;
  at.state_stride = traced ? rounded(m.state * L + SLACK) : ruled * states * at.rule_stride;
  at.rule_states = take((m.keeps_steps() ? m.steps + 1 : 2) * at.state_stride);
  at.checkpoints = take(m.schedule.places * (at.theta_stride + at.state_stride));
  at.mbar = take(m.gradient ? at.state_stride : 0);
  at.clipped = take(ruled && m.rule.clips() ? at.rule_stride : 0);
  at.factors = take(ruled && m.rule.clips() ? (m.steps + 1) * 16 : 0);
  at.rule_in = take(traced ? (3 * m.theta + m.state) * L : 0);
  at.rule_out = take(traced ? (m.theta + m.state) * L : 0);
  at.rule_cotangents = take(traced ? (m.theta + m.state) * L : 0);
  at.rule_found = take(traced ? (3 * m.theta + m.state) * L : 0);
  at.rule_once = take(size_of(m.traced_rule, Space::once) * L);
  at.rule_kept_stride = rounded(size_of(m.traced_rule, Space::kept) * L) + SLACK;
  at.rule_kept = take(at.rule_kept_stride * (m.store && m.gradient ? std::max<i64>(m.steps, 1) : 1));
  at.update_stride = rounded(m.theta * L + SLACK);
  const i64 updates = ruled || m.checkpointed() ? 1 : steps;
  at.updates = take(m.wants_rates && m.gradient ? updates * at.update_stride : 0);
  at.alphas = take(m.theta * L);
  at.fixed = take(m.fixed * L);
  for (int i = 0; i < 2; ++i) {
    const Set& set = i ? m.query : m.support;
    at.batch[i] = take(size_of(set, Space::batch) * L);
    at.ints[i] = take(rounded(size_of(set, Space::ints) * L) * per_i64 + per_i64);
  }
  at.seed = take((SEED_OUTPUT + rounded(m.output)) * L);
  at.other = take(most(Space::other) * L);
  at.output = take((OUTPUT_START + rounded(m.output)) * L);
  at.others_sum = take(m.fixed * L);
  at.total = next;

  next = 0;
  for (int i = 0; i < 3; ++i) at.constants[i] = take(i64(m.constants[i].size()) * L);
  at.shared_theta = take(m.theta * L);
  at.shared_fixed = take(m.fixed * L);
  at.shared = next;
  next = 0;
  at.sum_theta = take(m.before_tables());
  at.sum_fixed = take(m.fixed);
  i64 rates = 0;
  for (const Adapted& p : m.adapted) {
    at.rate_sums.push_back(rates);
    if (!p.rate_per_task)
      rates += (p.rate_per_step ? std::max<i64>(m.steps, 1) : 1) * (p.rate_element ? p.size : 1);
  }
  at.sum_rates = take(rates);
  at.sum_numbers = take(m.learns_numbers() ? m.steps * RULE_NUMBERS : 0);
  at.sums = next;
  next = 0;
  for (const Table& t : m.tables) {
    at.record_numbers.push_back(take((t.most + 1) * per_i64));
    at.record_values.push_back(take(t.most * t.width));
  }
  at.record = m.gradient ? next : 0;
  return at;
}

}  // namespace fm::machine
