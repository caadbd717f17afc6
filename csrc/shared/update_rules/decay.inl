// Weight decay as a part of the gradient. The files beside this one are the update rules, a file
// each: one step of an element, and its adjoint. They are included inside a namespace of the
// including file, which defines FM_INLINE and
//
//   Vec<S>          what a rule works on, S or a vector of S; broadcast(S)
//   RuleNumbers<S>  h[n], a number of the step; h.rest(n), 1 - it; h.has(n), whether it is there;
//                   h.c1 and c2, 1 - beta^(k+1), and their derivatives; h.k; h.first, k == 0; h.rule
//   E               theta, g, alpha and state[] of an element; next and next_state[] take the step;
//                   lambda and mbar[] become those of the step before but for what passes through g,
//                   v takes dJ/dg, alpha_grad dJ/dalpha, add(n, x) dJ/dnumber, if E::learns

// d = g + omega theta, and back from dJ/dd, in `e.v`.
template <class S, class E>
FM_INLINE Vec<S> decayed(const RuleNumbers<S>& h, const E& e) {
  return h.has(RuleNumber::weight_decay) ? e.g + h[RuleNumber::weight_decay] * e.theta : e.g;
}
template <class S, class E>
FM_INLINE void decayed_back(const RuleNumbers<S>& h, E& e) {
  if (!h.has(RuleNumber::weight_decay)) return;
  e.lambda += h[RuleNumber::weight_decay] * e.v;
  e.add(RuleNumber::weight_decay, e.v * e.theta);
}
