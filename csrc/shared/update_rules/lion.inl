// Lion: the sign of a running mean.
struct LionRule {
  template <class S, class E>
  FM_INLINE static Vec<S> direction(const RuleNumbers<S>& h, const E& e) {
    const S b1 = h[RuleNumber::beta1];
    const Vec<S> c = b1 * e.state[0] + h.rest(RuleNumber::beta1) * e.g, one = broadcast(S(1));
    const Vec<S> sign = c > Vec<S>{} ? one : (c < Vec<S>{} ? -one : c);
    return h.has(RuleNumber::weight_decay) ? sign + h[RuleNumber::weight_decay] * e.theta : sign;
  }
  template <class S, class E>
  FM_INLINE static void step(const RuleNumbers<S>& h, E& e) {
    const S b2 = h[RuleNumber::beta2];
    e.next = e.theta - e.alpha * direction(h, e);
    e.next_state[0] = b2 * e.state[0] + h.rest(RuleNumber::beta2) * e.g;
  }
  template <class S, class E>
  FM_INLINE static void back(const RuleNumbers<S>& h, E& e) {
    const S b2 = h[RuleNumber::beta2];
    e.alpha_grad = -e.lambda * direction(h, e);
    const Vec<S> to_m = e.mbar[0];
    e.v = h.rest(RuleNumber::beta2) * to_m, e.mbar[0] = b2 * to_m;
    e.add(RuleNumber::beta2, to_m * (e.state[0] - e.g));
    if (!h.has(RuleNumber::weight_decay)) return;
    e.add(RuleNumber::weight_decay, -(e.alpha * e.lambda * e.theta));
    e.lambda -= e.alpha * h[RuleNumber::weight_decay] * e.lambda;
  }
};
