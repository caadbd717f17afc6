// A task, or the tasks of all lanes, taken through one pass of a program: where each space lies, the
// passes of the support and the query set, and what is summed up after them.
#pragma once

#include "group_state.h"

namespace fm::machine {

template <class S>
class GroupPasses : protected GroupState<S> {
 public:
  using State = GroupState<S>;
  template <class... Args>
  explicit GroupPasses(const Machine& m, Args&&... args)
      : State(m, std::forward<Args>(args)...), scales_(m.adapted.size()) {}

 protected:
  using State::add;
  using State::aligned;
  using State::at_;
  using State::bad_index_;
  using State::call_;
  using State::count_;
  using State::direction_;
  using State::entries;
  using State::executor_;
  using State::first_;
  using State::fresh_;
  using State::kernels_;
  using State::L_;
  using State::losses_;
  using State::m_;
  using State::once_done_;
  using State::own_fixed_;
  using State::pack;
  using State::reached_;
  using State::seed_loss;
  using State::set;
  using State::shared_;
  using State::silence;
  using State::support_weight;
  using State::theta;
  using State::unpack;
  using State::unpack_sum;
  using State::w_;

  S* rule_gradient(i64 k) { return w_ + at_.rule_gradients + (m_.keeps_steps() ? k : 0) * at_.rule_stride; }
  Memory<S> memory_of_rule(i64 k) {
    Memory<S> mem{};
    const auto to = [&](Space s) -> S*& { return mem.at[int(s)]; };
    to(Space::work) = w_ + at_.work;
    to(Space::kept) = w_ + at_.rule_kept + (m_.store && m_.gradient ? k : 0) * at_.rule_kept_stride;
    to(Space::once) = w_ + at_.rule_once;
    to(Space::constant) = shared_ + at_.constants[2];
    to(Space::theta) = w_ + at_.rule_in;
    to(Space::fixed) = (own_fixed_ ? w_ + at_.fixed : shared_ + at_.shared_fixed) + m_.rule_fixed * L_;
    to(Space::output) = w_ + at_.rule_out;
    to(Space::direction) = w_ + at_.rule_cotangents;
    to(Space::curvature) = w_ + at_.rule_found;
    to(Space::other) = w_ + at_.other;
    mem.tiles = w_ + at_.tiles;
    return mem;
  }
  Memory<S> memory(int which, i64 k) {
    if (which == 2) return memory_of_rule(k);
    Memory<S> mem{};
    const auto to = [&](Space s) -> S*& { return mem.at[int(s)]; };
    to(Space::work) = w_ + at_.work;
    const i64 kept = which ? m_.checkpointed() : m_.store && m_.gradient ? k : 0;
    to(Space::kept) = w_ + at_.kept + kept * at_.kept_stride;
    to(Space::once) = w_ + at_.once + (which ? rounded(size_of(m_.support, Space::once) * L_) : 0);
    to(Space::constant) = shared_ + at_.constants[which];
    to(Space::theta) = theta(k);
    to(Space::fixed) = own_fixed_ ? w_ + at_.fixed : shared_ + at_.shared_fixed;
    to(Space::batch) = w_ + at_.batch[which];
    to(Space::direction) = const_cast<S*>(direction_);
    to(Space::seed) = w_ + at_.seed;
    const bool ruled = !which && !m_.plain_rule();
    to(Space::grad) = ruled ? rule_gradient(k) : w_ + (which && fresh_ ? at_.lambda : at_.grad);
    to(Space::curvature) = w_ + at_.grad;  // g is no longer needed then
    to(Space::other) = w_ + at_.other;
    to(Space::output) = w_ + at_.output;
    mem.ints = reinterpret_cast<const i64*>(w_ + aligned(at_.ints[which]));
    mem.tiles = w_ + at_.tiles;
    return mem;
  }
  // Where products that complete a gradient put what it leads to, and what they add it to.
  struct Update {
    S* to = nullptr;
    const S* from = nullptr;
  };
  void run_stage(int which, size_t stage, i64 k, const Update& update = {}) {
    const Program& p = set(which).program;
    if (stage >= p.stage_ends.size()) return;
    Memory<S> mem = memory(which, k);
    mem.update_to = update.to, mem.update_from = update.from, mem.update_scale = scales_.data();
    const auto runner = L_ == 1 ? executor_.rows : executor_.lanes;
    runner(p.steps.data() + p.stage_begin(stage), p.stage_ends[stage] - p.stage_begin(stage), mem);
    bad_index_ = bad_index_ || mem.bad_index;
  }
  void run_once(int which, i64 k) {
    if (once_done_ && !which) return;
    run_stage(which, 0, k);
    if (!which) once_done_ = true;
  }
  void support_gradient(i64 k, const Update& update = {}) {
    run_once(0, k);
    run_stage(0, 1, k, update);
  }
  // The support loss of step k, for the first time.
  void note_support(i64 k) {
    ++reached_;
    const double weight = support_weight(k);
    for (i64 l = 0; weight != 0.0 && l < count_; ++l) losses_[l] += weight * double(w_[at_.output + l]);
  }
  // lambda += scale * what the last stage says: H_k along `direction`, and of a support loss in the
  // objective its gradient, by the seed.
  void hessian_product(i64 k, const S* direction, S scale) {
    if (!m_.checkpointed()) {  // else the step has just been run
      if (m_.per_step) once_done_ = false;
      if (!m_.store) support_gradient(k);
      if (m_.per_step && m_.store) run_once(0, k);
    }
    direction_ = direction;
    std::fill(scales_.begin(), scales_.end(), scale);
    S* const lambda = w_ + at_.lambda;
    run_stage(0, 2, k, {lambda, lambda});
    for (size_t p = 0; p < m_.adapted.size(); ++p) {
      if (m_.at_once[1][p]) continue;
      S* const to = lambda + m_.adapted[p].offset * L_;
      kernels_.sgd_direction(m_.adapted[p].size * L_, -scale, nullptr,
                             w_ + at_.grad + m_.adapted[p].offset * L_, to, to);
    }
  }

  void run_query(i64 k, double s) {
    seed_loss(s);
    if (m_.output_grad) {
      S* const to = w_ + at_.seed + SEED_OUTPUT * L_;
      if (k == m_.steps && call_.output_grad) {
        pack(call_.output_grad, m_.output, m_.output, to);
        silence(to, m_.output);
      } else {
        std::fill_n(to, m_.output * L_, S(0));
      }
    }
    run_stage(1, 0, k);
    run_stage(1, 1, k);
    const S* const out = w_ + at_.output;
    if (m_.query_loss && s != 0.0)
      for (i64 l = 0; l < count_; ++l) losses_[l] += s * double(out[l]);
    if (k == m_.steps && call_.output) unpack(out + OUTPUT_START * L_, m_.output, m_.output, call_.output);
  }

  // Adds a pass's gradients by what does not adapt, and by its set, times `scale` to their totals.
  void collect(int which, i64 k, S scale) {
    const S* const other = w_ + at_.other;
    for (const Fixed& f : m_.others) {
      const i64 from = f.grad[which];
      S* const to = w_ + at_.others_sum + f.offset * L_;
      if (from >= 0) kernels_.sgd_direction(f.size * L_, -scale, nullptr, other + from * L_, to, to);
    }
    if (which == 2) return;
    const Set& s = set(which);
    const i64 sets = !which && m_.per_step ? m_.steps : 1;
    for (size_t i = 0; i < s.entries.size(); ++i) {
      const Entry& e = s.entries[i];
      S* const grad = entries(which)[i].grad;
      if (e.grad >= 0 && grad)
        unpack_sum(other + e.grad * L_, sets * e.size, e.size, scale, grad + (sets > 1 ? k * e.size : 0));
    }
  }
  void zero_entry_gradients(int which) {
    const Set& s = set(which);
    const i64 sets = !which && m_.per_step ? m_.steps : 1;
    for (size_t i = 0; i < s.entries.size(); ++i)
      if (S* const grad = entries(which)[i].grad)
        std::fill_n(grad + first_ * sets * s.entries[i].size, count_ * sets * s.entries[i].size, S(0));
  }

  std::vector<S> scales_;  // of each adapted parameter, as `Memory` says
};

}  // namespace fm::machine
