// The losses, primal and tangent; formulas in docs/losses.md. Values are summed in double.

// Sums example(n, factor, side_factor), which returns l_n or its tangent, over the examples.
template <class S, class Example>
FM_INLINE double loss_sum(const LossCall<S>& l, const Example& example) {
  const double denominator = loss_denominator(l), share = l.scale / denominator,
               side = l.side_scale / denominator;
  if (l.dz)
    for (i64 r = 0; r < l.examples * l.rows; ++r)
      zero_columns(l.dz + r * l.ld, l.cols / lanes<S> * lanes<S>, l.ld);
  double value = 0;
  for (i64 n = 0; n < l.examples; ++n) {
    if (!l.weights && !l.dweights) {
      value += double(example(n, S(share), S(side)));
      continue;
    }
    const double weight = l.weights ? double(l.weights[n]) : 1.0;
    const double term = example(n, S(share * weight), S(side * weight));
    value += weight * term;
    if (l.dweights) l.dweights[n] += S(side * term);
  }
  value /= denominator;
  if (l.dweights && l.spec.normalise_sum && !l.spec.sum)
    for (i64 n = 0; n < l.examples; ++n) l.dweights[n] -= S(side * example_share(l, n) * value);
  return value;
}

template <class S, bool TANGENT, class Terms>
double elementwise_sum(const LossCall<S>& l, const Terms& terms) {
  const S share = l.spec.sum ? S(1) : S(1) / S(l.rows * l.cols);
  return loss_sum(l, [&](i64 n, S factor, S side_factor) {
    return elementwise_example<S, TANGENT>(l, terms, n, share, factor, side_factor);
  });
}

template <class S, bool TANGENT>
double cross_entropy_sum(const LossCall<S>& l) {
  if (l.rows == 1)
    return loss_sum(l, [&](i64 n, S factor, S side_factor) {
      return cross_entropy_position<S, TANGENT, false>(l, n, factor, side_factor);
    });
  return loss_sum(l, [&](i64 n, S factor, S side_factor) {
    double value = 0;
    for (i64 row = n * l.rows; row < (n + 1) * l.rows; ++row)
      value += double(cross_entropy_position<S, TANGENT, true>(l, row, factor, side_factor));
    return value;
  });
}

template <class S, bool TANGENT>
double loss_pass(const LossCall<S>& l) {
  switch (l.spec.kind) {
    case LossKind::mse:
      return elementwise_sum<S, TANGENT>(l, SquaredError<S>{});
    case LossKind::l1:
      return elementwise_sum<S, TANGENT>(l, AbsoluteError<S>{});
    case LossKind::smooth_l1:
      return elementwise_sum<S, TANGENT>(l, SmoothL1<S>{S(l.spec.beta)});
    case LossKind::huber:
      return elementwise_sum<S, TANGENT>(l, Huber<S>{S(l.spec.beta)});
    case LossKind::bce_with_logits:
      return elementwise_sum<S, TANGENT>(l, BinaryCrossEntropy<S>{});
    case LossKind::cross_entropy:
      return cross_entropy_sum<S, TANGENT>(l);
    case LossKind::none:
      break;
  }
  return 0;
}

template <class S>
double loss(const LossCall<S>& l) {
  return loss_pass<S, false>(l);
}
template <class S>
void loss_tangent(const LossCall<S>& l) {
  loss_pass<S, true>(l);
}
