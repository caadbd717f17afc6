// RMSProp, also centered, with momentum.
struct RmspropRule {
  template <class S>
  struct Parts {
    Vec<S> d, s, c, root, below, u, b;
    int at_momentum;
  };
  template <class S, class E>
  FM_INLINE static Parts<S> parts(const RuleNumbers<S>& h, const E& e) {
    const S a = h[RuleNumber::alpha];
    Parts<S> p;
    p.at_momentum = h.rule.centered ? 2 : 1;
    p.d = decayed(h, e);
    p.s = a * e.state[0] + h.rest(RuleNumber::alpha) * p.d * p.d;
    Vec<S> square = p.s;
    p.c = Vec<S>{};
    if (h.rule.centered) {
      p.c = a * e.state[1] + h.rest(RuleNumber::alpha) * p.d;
      square -= p.c * p.c;
    }
    if (h.has(RuleNumber::eps_root)) square += h[RuleNumber::eps_root];
    p.root = sqrt_(square);
    p.below = p.root + h[RuleNumber::eps];
    p.u = p.d / p.below;
    p.b = p.u;
    if (h.has(RuleNumber::momentum)) p.b += h[RuleNumber::momentum] * e.state[p.at_momentum];
    return p;
  }
  template <class S, class E>
  FM_INLINE static void step(const RuleNumbers<S>& h, E& e) {
    const Parts<S> p = parts(h, e);
    e.next = e.theta - e.alpha * p.b;
    e.next_state[0] = p.s;
    if (h.rule.centered) e.next_state[1] = p.c;
    if (h.has(RuleNumber::momentum)) e.next_state[p.at_momentum] = p.b;
  }
  template <class S, class E>
  FM_INLINE static void back(const RuleNumbers<S>& h, E& e) {
    const S a = h[RuleNumber::alpha], mu = h[RuleNumber::momentum];
    const Parts<S> p = parts(h, e);
    Vec<S> to_u = -e.alpha * e.lambda;
    e.alpha_grad = -e.lambda * p.b;
    if (h.has(RuleNumber::momentum)) {
      Vec<S>& mbar = e.mbar[p.at_momentum];
      to_u += mbar;
      e.add(RuleNumber::momentum, to_u * e.state[p.at_momentum]);
      mbar = mu * to_u;
    }
    const Vec<S> to_below = -to_u * p.u / p.below, to_square = to_below / (2 * p.root);
    const Vec<S> to_s = e.mbar[0] + to_square;
    Vec<S> to_c = Vec<S>{};
    e.v = to_u / p.below + 2 * h.rest(RuleNumber::alpha) * p.d * to_s;
    e.mbar[0] = a * to_s;
    if (h.rule.centered) {
      to_c = e.mbar[1] - 2 * p.c * to_square;
      e.v += h.rest(RuleNumber::alpha) * to_c;
      e.mbar[1] = a * to_c;
    }
    if constexpr (E::learns) {
      e.add(RuleNumber::eps, to_below);
      e.add(RuleNumber::eps_root, to_square);
      e.add(RuleNumber::alpha, to_s * (e.state[0] - p.d * p.d));
      if (h.rule.centered) e.add(RuleNumber::alpha, to_c * (e.state[1] - p.d));
    }
    decayed_back(h, e);
  }
};
