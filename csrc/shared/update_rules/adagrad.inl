// Adagrad.
struct AdagradRule {
  template <class S, class E>
  FM_INLINE static void step(const RuleNumbers<S>& h, E& e) {
    const Vec<S> d = decayed(h, e), s = e.state[0] + d * d;
    const Vec<S> root = sqrt_(h.has(RuleNumber::eps_root) ? s + h[RuleNumber::eps_root] : s);
    const S slower = 1 / (1 + h.k * h[RuleNumber::lr_decay]);
    e.next = e.theta - e.alpha * slower * (d / (root + h[RuleNumber::eps]));
    e.next_state[0] = s;
  }
  template <class S, class E>
  FM_INLINE static void back(const RuleNumbers<S>& h, E& e) {
    const Vec<S> d = decayed(h, e), s = e.state[0] + d * d;
    const Vec<S> root = sqrt_(h.has(RuleNumber::eps_root) ? s + h[RuleNumber::eps_root] : s);
    const Vec<S> below = root + h[RuleNumber::eps], u = d / below;
    const S slower = 1 / (1 + h.k * h[RuleNumber::lr_decay]);
    const Vec<S> by_rate = -e.lambda * u, to_u = -e.alpha * slower * e.lambda;
    e.alpha_grad = by_rate * slower;
    const Vec<S> to_below = -to_u * u / below, to_s = to_below / (2 * root);
    const Vec<S> to_sum = e.mbar[0] + to_s;
    if constexpr (E::learns) {
      e.add(RuleNumber::lr_decay, -(by_rate * e.alpha * (h.k * slower * slower)));
      e.add(RuleNumber::eps, to_below);
      e.add(RuleNumber::eps_root, to_s);
    }
    e.v = to_u / below + 2 * d * to_sum;
    e.mbar[0] = to_sum;
    decayed_back(h, e);
  }
};
