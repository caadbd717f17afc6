// Adam, and AdamW, whose weight decay is apart from the gradient.
template <bool APART>
struct AdamRule {
  template <class S>
  struct Parts {
    Vec<S> d, m, s, root, share, q;  // s: mean square; share: of m in q, its step
  };
  template <class S, class E>
  FM_INLINE static Parts<S> parts(const RuleNumbers<S>& h, const E& e) {
    const S b1 = h[RuleNumber::beta1], b2 = h[RuleNumber::beta2];
    Parts<S> p;
    p.d = APART ? e.g : decayed(h, e);
    p.m = b1 * e.state[0] + h.rest(RuleNumber::beta1) * p.d;
    p.s = b2 * e.state[1] + h.rest(RuleNumber::beta2) * p.d * p.d;
    p.root =
        sqrt_(h.has(RuleNumber::eps_root) ? p.s * (1 / h.c2) + h[RuleNumber::eps_root] : p.s * (1 / h.c2));
    p.share = 1 / (p.root + h[RuleNumber::eps]);
    p.q = p.m * p.share;
    return p;
  }
  template <class S, class E>
  FM_INLINE static void step(const RuleNumbers<S>& h, E& e) {
    const Parts<S> p = parts(h, e);
    const S omega = h[RuleNumber::weight_decay];
    const Vec<S> theta =
        APART && h.has(RuleNumber::weight_decay) ? e.theta - e.theta * (e.alpha * omega) : e.theta;
    e.next = theta - e.alpha * (1 / h.c1) * p.q;
    e.next_state[0] = p.m, e.next_state[1] = p.s;
  }
  template <class S, class E>
  FM_INLINE static void back(const RuleNumbers<S>& h, E& e) {
    const S b1 = h[RuleNumber::beta1], b2 = h[RuleNumber::beta2], omega = h[RuleNumber::weight_decay];
    const Parts<S> p = parts(h, e);
    const Vec<S> lambda = e.lambda;
    const Vec<S> to_q = -e.alpha * (1 / h.c1) * lambda;
    const Vec<S> by_m = to_q * p.share, to_m = e.mbar[0] + by_m;
    const Vec<S> to_below = -by_m * p.q;               // to what m is divided by
    const Vec<S> to_square = to_below / (2 * p.root);  // of s / c2
    const Vec<S> to_s = e.mbar[1] + to_square * (1 / h.c2);
    e.v = h.rest(RuleNumber::beta1) * to_m + 2 * h.rest(RuleNumber::beta2) * p.d * to_s;
    e.mbar[0] = b1 * to_m, e.mbar[1] = b2 * to_s;
    e.alpha_grad = -lambda * p.q * (1 / h.c1);
    if constexpr (E::learns) {
      const Vec<S> by_c1 = e.alpha * p.q * lambda * (1 / (h.c1 * h.c1)),
                   by_c2 = -to_square * p.s * (1 / (h.c2 * h.c2));
      e.add(RuleNumber::beta1, to_m * (e.state[0] - p.d) + by_c1 * h.dc1);
      e.add(RuleNumber::beta2, to_s * (e.state[1] - p.d * p.d) + by_c2 * h.dc2);
      e.add(RuleNumber::eps, to_below);
      e.add(RuleNumber::eps_root, to_square);
    }
    if (!APART) return decayed_back(h, e);
    if (!h.has(RuleNumber::weight_decay)) return;
    e.alpha_grad -= omega * e.theta * lambda;
    e.add(RuleNumber::weight_decay, -(e.alpha * e.theta * lambda));
    e.lambda = lambda - lambda * (e.alpha * omega);
  }
};
