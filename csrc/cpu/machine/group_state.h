// What a task, or the tasks of all lanes, have in memory: packing, sets, learning rates.
#pragma once

#include <utility>

#include "../kernels.h"
#include "tables.h"

namespace fm::machine {

// Constants and what all tasks share, spread over the lanes.
template <class S>
void fill_shared(const Machine& m, const Layout& at, const MachineCall<S>& call, S* base) {
  const i64 L = m.lanes;
  const auto spread = [&](auto from, i64 n, S* to) {
    if (L == 1) {
      for (i64 i = 0; i < n; ++i) to[i] = S(from[i]);
      return;
    }
    for (i64 i = 0; i < n; ++i) std::fill_n(to + i * L, L, S(from[i]));
  };
  std::fill(base, base + at.shared, S(0));
  for (int i = 0; i < 3; ++i)
    spread(m.constants[i].data(), i64(m.constants[i].size()), base + at.constants[i]);
  for (size_t p = 0; p < m.adapted.size(); ++p)
    if (!m.adapted[p].per_task && !m.is_table(p))
      spread(call.adapted[p].data, m.adapted[p].size, base + at.shared_theta + m.adapted[p].offset * L);
  for (size_t p = 0; p < m.others.size(); ++p)
    if (!m.others[p].per_task)
      spread(call.others[p].data, m.others[p].size, base + at.shared_fixed + m.others[p].offset * L);
}

// The gradients of one table: the rows of all tasks, in their order.
template <class S>
void sum_table(const Machine& m, const Layout& at, const Executor<S>& executor, const MachineCall<S>& call,
               size_t table, S* records) {
  const Table& t = m.tables[table];
  S* const to = call.adapted[t.adapted].grad;
  if (!to || m.adapted[t.adapted].per_task) return;
  std::fill_n(to, t.rows * t.width, S(0));
  for (i64 task = 0; task < call.tasks; ++task) {
    const TableRecord<S> record(at, records, task);
    const i64* const numbers = record.numbers(at.record_numbers[table]);
    executor.add_rows(numbers[0], t.width, numbers + 1, record.values(at.record_values[table]), to);
  }
}

// Gradients that are sums over tasks, to the caller.
template <class S>
void write_sums(const Machine& m, const Layout& at, const MachineCall<S>& call, const S* total) {
  for (size_t p = 0; p < m.adapted.size(); ++p) {
    const Adapted& a = m.adapted[p];
    if (!a.per_task && !m.is_table(p) && call.adapted[p].grad)
      std::copy_n(total + at.sum_theta + a.offset, a.size, call.adapted[p].grad);
    if (!a.rate_per_task && call.adapted[p].rate_grad) {
      const i64 n = (a.rate_per_step ? m.steps : 1) * (a.rate_element ? a.size : 1);
      std::copy_n(total + at.sum_rates + at.rate_sums[p], n, call.adapted[p].rate_grad);
    }
  }
  if (call.number_grads) std::copy_n(total + at.sum_numbers, m.steps * RULE_NUMBERS, call.number_grads);
  for (size_t p = 0; p < m.others.size(); ++p)
    if (!m.others[p].per_task && call.others[p].grad)
      std::copy_n(total + at.sum_fixed + m.others[p].offset, m.others[p].size, call.others[p].grad);
}

constexpr i64 MOST_LANES = 64;

template <class S>
class GroupState {
 public:
  GroupState(const Machine& m, const Layout& at, const Kernels<S>& kernels, const Executor<S>& executor,
             const MachineCall<S>& call, S* shared, S* records, S* workspace)
      : m_(m),
        at_(at),
        kernels_(kernels),
        executor_(executor),
        call_(call),
        shared_(shared),
        records_(records),
        w_(workspace),
        L_(m.lanes),
        table_rows_(m) {
    for (const Fixed& f : m.others) own_fixed_ = own_fixed_ || f.per_task;
    for (const Adapted& a : m.adapted) own_theta_ = own_theta_ || a.per_task;
    own_theta_ = own_theta_ || !m.tables.empty();
  }

 protected:
  S* theta(i64 k) {
    if (k == 0 && !own_theta_) return shared_ + at_.shared_theta;  // nobody writes to it
    const i64 place = m_.keeps_steps() || k == 0 ? k : 1 + k % 2;
    return w_ + at_.theta + place * at_.theta_stride;
  }
  // 0: the support set's, 1: the query set's, 2: the rule's.
  const Set& set(int which) const { return which == 2 ? m_.traced_rule : which ? m_.query : m_.support; }
  const std::vector<EntryCall<S>>& entries(int which) const { return which ? call_.query : call_.support; }
  double step_weight(i64 k) const {
    if (!m_.query_loss) return 0.0;
    return call_.step_weights.empty() ? (k == m_.steps ? 1.0 : 0.0) : call_.step_weights[k];
  }

  double support_weight(i64 k) const {
    return m_.support_step_weights.empty() ? 0.0 : m_.support_step_weights[size_t(k)];
  }
  // The cotangents of a loss that is in the objective with this weight: c_t times it, of every task.
  void seed_loss(double weight) {
    for (i64 l = 0; l < L_; ++l) {
      const bool there = l < count_;
      const double c =
          (call_.task_weights && there ? double(call_.task_weights[first_ + l]) : 1.0) / double(call_.tasks);
      w_[at_.seed + l] = there ? S(c * weight) : S(0);
    }
  }

  // [T, stride] of the user's, `n` elements of each task, to lanes; absent tasks are the last one.
  template <class From, class To>
  void pack_as(const From* from, i64 stride, i64 n, To* to) const {
    if (L_ == 1) {
      std::copy_n(from + first_ * stride, n, to);
      return;
    }
    const From* task[MOST_LANES];
    for (i64 l = 0; l < L_; ++l) task[l] = from + (first_ + std::min(l, count_ - 1)) * stride;
    for (i64 i = 0; i < n; ++i, to += L_)
      for (i64 l = 0; l < L_; ++l) to[l] = To(task[l][i]);
  }
  void pack(const S* from, i64 stride, i64 n, S* to) const { pack_as(from, stride, n, to); }
  void unpack(const S* from, i64 stride, i64 n, S* to) const {
    for (i64 l = 0; l < count_; ++l)
      for (i64 i = 0; i < n; ++i) to[(first_ + l) * stride + i] = from[i * L_ + l];
  }
  void unpack_sum(const S* from, i64 stride, i64 n, S scale, S* to) const {
    for (i64 l = 0; l < count_; ++l)
      for (i64 i = 0; i < n; ++i) to[(first_ + l) * stride + i] += scale * from[i * L_ + l];
  }
  // Zero in the lanes of absent tasks.
  void silence(S* x, i64 n) const {
    for (i64 i = 0; i < n; ++i)
      for (i64 l = count_; l < L_; ++l) x[i * L_ + l] = 0;
  }
  void add(const S* from, i64 n, S* to) const {
    if (n > 0) kernels_.add(n, to, from, to);
  }

  void load_set(int which, i64 k) {
    const Set& s = set(which);
    const i64 sets = !which && m_.per_step ? m_.steps : 1;
    i64* const ints = reinterpret_cast<i64*>(w_ + aligned(at_.ints[which]));
    for (size_t i = 0; i < s.entries.size(); ++i) {
      const Entry& e = s.entries[i];
      const void* const data = entries(which)[i].data;
      if (e.integer)
        pack_as(static_cast<const i64*>(data) + k * e.size, sets * e.size, e.size, ints + e.offset * L_);
      else
        pack_as(static_cast<const S*>(data) + k * e.size, sets * e.size, e.size,
                w_ + at_.batch[which] + e.offset * L_);
    }
    if (!which && m_.per_step) once_done_ = false;
  }
  static i64 aligned(i64 at) {
    constexpr i64 per = i64(sizeof(i64) / sizeof(S));
    return (at + per - 1) / per * per;
  }

  // ---- tables
  // The rows that the tasks need, from the caller's tables to theta(0), and their indices.
  void load_tables() {
    if (m_.tables.empty()) return;
    i64* ints[2];
    for (int which = 0; which < 2; ++which) {
      const bool used = which ? m_.query.present : m_.support.present && m_.steps > 0;
      ints[which] = used ? reinterpret_cast<i64*>(w_ + aligned(at_.ints[which])) : nullptr;
    }
    if (!table_rows_.number(ints)) bad_index_ = true;
    for (size_t t = 0; t < m_.tables.size(); ++t) {
      const Table& table = m_.tables[t];
      const Adapted& a = m_.adapted[table.adapted];
      for (i64 l = 0; l < L_; ++l) {
        const S* from = call_.adapted[table.adapted].data;
        if (a.per_task) from += (first_ + std::min(l, count_ - 1)) * table.rows * table.width;
        S* to = theta(0) + a.offset * L_ + l;
        for (const i64 row : table_rows_.rows(t, l)) {
          const S* const own = from + row * table.width;
          if (L_ == 1)
            std::copy_n(own, table.width, to);
          else
            for (i64 i = 0; i < table.width; ++i) to[i * L_] = own[i];
          to += table.width * L_;
        }
        // nobody reads the rest, but the rule changes it
        const S* const end = theta(0) + (a.offset + a.size) * L_;
        for (; to < end; to += L_) *to = 0;
      }
    }
  }
  // The gradients of the rows, for the caller to add up, or to the task's own.
  void write_tables(const S* lambda) {
    for (size_t t = 0; t < m_.tables.size(); ++t) {
      const Table& table = m_.tables[t];
      const Adapted& a = m_.adapted[table.adapted];
      S* const grad = call_.adapted[table.adapted].grad;
      if (!grad) continue;
      for (i64 l = 0; l < count_; ++l) {
        const std::vector<i64>& rows = table_rows_.rows(t, l);
        const S* const from = lambda + a.offset * L_ + l;
        S* const own = a.per_task ? grad + (first_ + l) * table.rows * table.width : nullptr;
        const TableRecord<S> record(at_, records_, first_ + l);
        if (own) {
          std::fill_n(own, table.rows * table.width, S(0));
        } else {
          i64* const numbers = record.numbers(at_.record_numbers[t]);
          numbers[0] = i64(rows.size());
          std::copy(rows.begin(), rows.end(), numbers + 1);
        }
        S* const values = own ? nullptr : record.values(at_.record_values[t]);
        for (size_t r = 0; r < rows.size(); ++r) {
          const S* const row = from + i64(r) * table.width * L_;
          S* const to = own ? own + rows[r] * table.width : values + i64(r) * table.width;
          if (L_ == 1)
            std::copy_n(row, table.width, to);
          else
            for (i64 i = 0; i < table.width; ++i) to[i] = row[i * L_];
        }
      }
    }
  }

  // ---- learning rates
  // Whether one number is the rate of all parameters in all lanes.
  bool one_rate(i64 k, S& alpha) {
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      const Adapted& a = m_.adapted[p];
      if (a.rate_element || (a.rate_per_task && L_ > 1)) return false;
      S own = 0;
      rates(k, p, own);
      if (p > 0 && own != alpha) return false;
      alpha = own;
    }
    return !m_.adapted.empty();
  }
  // What step k subtracts, times its rate.
  S* updates(i64 k) { return w_ + at_.updates + (m_.checkpointed() ? 0 : k) * at_.update_stride; }
  // Elements for all lanes, or null and one number.
  const S* rates(i64 k, size_t p, S& alpha) {
    const Adapted& a = m_.adapted[p];
    const S* const all = call_.adapted[p].rate;
    const i64 each = a.rate_element ? a.size : 1, own = a.rate_per_task ? each : 0,
              row = (a.rate_per_task ? call_.tasks : 1) * each;
    const S* const step = all + (a.rate_per_step ? k * row : 0);
    if (!a.rate_element && (!a.rate_per_task || L_ == 1)) {
      alpha = step[first_ * own];
      return nullptr;
    }
    if (L_ == 1) return step + first_ * own;
    S* const to = w_ + at_.alphas;
    for (i64 l = 0; l < L_; ++l) {
      const S* const task = step + (first_ + std::min(l, count_ - 1)) * own;
      for (i64 i = 0; i < a.size; ++i) to[i * L_ + l] = task[a.rate_element ? i : 0];
    }
    return to;
  }
  void zero_rate_gradients() {
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      const Adapted& a = m_.adapted[p];
      S* const grad = call_.adapted[p].rate_grad;
      if (!grad || !a.rate_per_task) continue;
      const i64 each = a.rate_element ? a.size : 1;
      for (i64 k = 0; k < (a.rate_per_step ? m_.steps : 1); ++k)
        std::fill_n(grad + (k * call_.tasks + first_) * each, count_ * each, S(0));
    }
  }
  // d alpha_k = -lambda_{k+1} u_k, for the tasks that are there.
  void rate_gradients(i64 k) {
    const S* const u = updates(k);
    const S* const lambda = w_ + at_.lambda;
    for (size_t p = 0; p < m_.adapted.size(); ++p)
      add_rate_gradient(k, p, [&](i64 at) { return -double(lambda[at]) * double(u[at]); });
  }
  // Adds the gradient of one rate; `element(at)` is that of element `at` of theta.
  template <class Element>
  void add_rate_gradient(i64 k, size_t p, const Element& element) {
    const Adapted& a = m_.adapted[p];
    S* const grad = call_.adapted[p].rate_grad;
    if (!grad) return;
    const i64 each = a.rate_element ? a.size : 1, row = a.rate_per_step ? k : 0;
    for (i64 l = 0; l < count_; ++l) {
      S* const to = a.rate_per_task ? grad + (row * call_.tasks + first_ + l) * each
                                    : sums_ + at_.sum_rates + at_.rate_sums[p] + row * each;
      double total = 0;
      for (i64 i = 0; i < a.size; ++i) {
        const double here = element((a.offset + i) * L_ + l);
        if (a.rate_element)
          to[i] += S(here);
        else
          total += here;
      }
      if (!a.rate_element) to[0] += S(total);
    }
  }

  const Machine& m_;
  const Layout& at_;
  const Kernels<S>& kernels_;
  const Executor<S>& executor_;
  const MachineCall<S>& call_;
  S *const shared_, *const records_, *const w_;
  const i64 L_;
  TableRows table_rows_;
  bool own_fixed_ = false, own_theta_ = false, once_done_ = false, rule_once_done_ = false,
       bad_index_ = false;
  bool fresh_ = false;  // lambda has not been written yet
  const S* direction_ = nullptr;
  i64 first_ = 0, count_ = 0;
  i64 reached_ = 0;  // steps that have been run at least once
  S* sums_ = nullptr;
  double losses_[MOST_LANES] = {};
};

}  // namespace fm::machine
