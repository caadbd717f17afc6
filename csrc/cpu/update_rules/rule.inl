// The loop around one element of a rule: vectors of everything that it reads and gives.

// The numbers of a step, and what follows from them alone.
template <class S>
struct RuleNumbers {
  const Rule& rule;
  S values[RULE_NUMBERS], rests[RULE_NUMBERS];  // rests: 1 - value, which float32 would round badly
  S c1 = 1, c2 = 1;                             // 1 - beta^(k+1)
  S dc1 = 0, dc2 = 0;                           // their derivatives by beta
  S k;
  bool on[RULE_NUMBERS];
  bool first;
  FM_INLINE RuleNumbers(const RuleCall<S>& c) : rule(*c.rule), k(S(c.k)), first(c.k == 0) {
    for (int i = 0; i < RULE_NUMBERS; ++i) {
      values[i] = S(c.numbers[i]), rests[i] = S(1 - c.numbers[i]);
      on[i] = rule.on[i];
    }
    const double betas[2] = {c.numbers[int(RuleNumber::beta1)], c.numbers[int(RuleNumber::beta2)]};
    double powers[2] = {1, 1};  // beta^k
    for (int i = 0; i < 2; ++i) {
      double base = betas[i];
      for (i64 e = c.k; e > 0; e >>= 1, base *= base)
        if (e & 1) powers[i] *= base;
    }
    c1 = S(1 - powers[0] * betas[0]), c2 = S(1 - powers[1] * betas[1]);
    dc1 = S(-double(c.k + 1) * powers[0]), dc2 = S(-double(c.k + 1) * powers[1]);
  }
  FM_INLINE S operator[](RuleNumber n) const { return values[int(n)]; }
  FM_INLINE S rest(RuleNumber n) const { return rests[int(n)]; }
  FM_INLINE bool has(RuleNumber n) const { return on[int(n)]; }
};

// LEARNS: gradients by the numbers are wanted.
template <class S, bool LEARNS>
struct RuleElement {
  static constexpr bool learns = LEARNS;
  Vec<S> theta, g, alpha, state[MOST_RULE_STATES] = {};
  Vec<S> next, next_state[MOST_RULE_STATES] = {};
  Vec<S> lambda, mbar[MOST_RULE_STATES] = {}, v, alpha_grad, keep;
  Vec<S> grads[LEARNS ? RULE_NUMBERS : 1] = {};  // by the numbers, of all elements that are kept
  FM_INLINE void add(RuleNumber n, Vec<S> grad) {
    if constexpr (LEARNS) grads[int(n)] += keep != Vec<S>{} ? grad : Vec<S>{};
  }
};

template <int STATES, class S, class E>
FM_INLINE void load_element(const RuleCall<S>& c, const RuleNumbers<S>& h, i64 i, E& e) {
  e.theta = load(c.theta + i), e.g = load(c.g + i);
  e.alpha = c.alphas ? load(c.alphas + i) : broadcast(c.alpha);
  for (int s = 0; s < STATES; ++s)
    e.state[s] = c.state[s] ? load(c.state[s] + i) : broadcast(h[RuleNumber::initial_accumulator_value]);
}

// Zero wherever there is only padding, whatever a rule makes of zeros.
template <class S>
FM_INLINE Vec<S> kept(Vec<S> x, const Vec<S>& keep) {
  return keep != Vec<S>{} ? x : Vec<S>{};
}
template <class S>
FM_INLINE Vec<S> mask_at(const S* mask, i64 i, i64 n) {
  Vec<S> keep = mask ? load(mask + i) : broadcast(S(1));
  if (n - i < lanes<S>)
    for (i64 l = n - i; l < lanes<S>; ++l) keep[l] = 0;
  return keep;
}

template <class S, class R, int STATES>
void rule_step_of(const RuleCall<S>& c) {
  const RuleNumbers<S> h(c);
  for (i64 i = 0; i < c.n; i += lanes<S>) {
    RuleElement<S, false> e;
    load_element<STATES>(c, h, i, e);
    R::step(h, e);
    const Vec<S> keep = mask_at(c.mask, i, c.n);
    store(c.next + i, kept<S>(e.next, keep));
    for (int s = 0; s < STATES; ++s) store(c.next_state[s] + i, kept<S>(e.next_state[s], keep));
  }
}

// Vectors that are added up before their sum is: long sums in parts have a smaller error.
constexpr i64 RULE_PART = 64;

template <class S, class R, int STATES, bool LEARNS>
void rule_back_of(const RuleCall<S>& c) {
  const RuleNumbers<S> h(c);
  constexpr i64 PART = RULE_PART * lanes<S>;
  for (i64 first = 0; first < c.n; first += PART) {
    const i64 end = c.n - first < PART ? c.n : first + PART;
    RuleElement<S, LEARNS> e;  // its `grads` are sums
    for (i64 i = first; i < end; i += lanes<S>) {
      const Vec<S> keep = mask_at(c.mask, i, c.n);
      load_element<STATES>(c, h, i, e);
      e.keep = keep, e.lambda = load(c.lambda + i);
      for (int s = 0; s < STATES; ++s) e.mbar[s] = load(c.mbar[s] + i);
      R::back(h, e);
      store(c.lambda + i, kept<S>(e.lambda, keep));
      store(c.v + i, kept<S>(e.v, keep));
      for (int s = 0; s < STATES; ++s) store(c.mbar[s] + i, kept<S>(e.mbar[s], keep));
      if (c.alpha_grad) store(c.alpha_grad + i, kept<S>(e.alpha_grad, keep));
    }
    if constexpr (LEARNS)
      for (int p = 0; p < RULE_NUMBERS; ++p)
        if (c.rule->learned[p]) c.number_grads[p] += double(sum<S>(e.grads[p]));
  }
}
