// SGD with momentum, dampening, Nesterov's momentum and weight decay.
struct SgdRule {
  template <class S, class E>
  FM_INLINE static Vec<S> buffer(const RuleNumbers<S>& h, const E& e, Vec<S> d) {
    if (h.first) return d;
    return h[RuleNumber::momentum] * e.state[0] + h.rest(RuleNumber::dampening) * d;
  }
  template <class S, class E>
  FM_INLINE static void step(const RuleNumbers<S>& h, E& e) {
    Vec<S> direction = decayed(h, e);
    if (h.has(RuleNumber::momentum)) {
      const Vec<S> d = direction;
      e.next_state[0] = buffer(h, e, d);
      direction = h.rule.nesterov ? d + h[RuleNumber::momentum] * e.next_state[0] : e.next_state[0];
    }
    e.next = e.theta - e.alpha * direction;
  }
  template <class S, class E>
  FM_INLINE static void back(const RuleNumbers<S>& h, E& e) {
    const Vec<S> d = decayed(h, e), along = -e.alpha * e.lambda;
    e.v = along, e.alpha_grad = -e.lambda * d;
    if (h.has(RuleNumber::momentum)) {
      const S mu = h[RuleNumber::momentum];
      const Vec<S> m = buffer(h, e, d);
      const bool nesterov = h.rule.nesterov;
      const Vec<S> to_m = e.mbar[0] + (nesterov ? mu * along : along);
      e.alpha_grad = -e.lambda * (nesterov ? d + mu * m : m);
      e.v = nesterov ? along : Vec<S>{};
      Vec<S> by_mu = nesterov ? along * m : Vec<S>{};
      if (h.first) {
        e.v += to_m, e.mbar[0] = Vec<S>{};
      } else {
        e.v += h.rest(RuleNumber::dampening) * to_m, e.mbar[0] = mu * to_m;
        by_mu += to_m * e.state[0];
        e.add(RuleNumber::dampening, -(to_m * d));
      }
      e.add(RuleNumber::momentum, by_mu);
    }
    decayed_back(h, e);
  }
};
