// The losses of one example, primal and tangent, for every kernel; formulas in docs/losses.md.
// Included inside a namespace of the including file, after functions.inl.

// Terms of one element of an element-wise loss at output z and target y: value, d/dz, d2/dz2, d/dy,
// d2/dz dy.
template <class S>
struct LossTerms {
  S value, dz, dzz, dy, dzy;
};

template <class S>
struct SquaredError {
  FM_INLINE LossTerms<S> operator()(S z, S y, S) const {
    const S d = z - y;
    return {d * d, S(2) * d, S(2), S(-2) * d, S(-2)};
  }
};
template <class S>
FM_INLINE S sign_(S d) {
  return d > 0 ? S(1) : d < 0 ? S(-1) : d;
}
template <class S>
struct AbsoluteError {
  FM_INLINE LossTerms<S> operator()(S z, S y, S) const {
    const S d = z - y, sign = sign_(d);
    return {d < 0 ? -d : d, sign, S(0), -sign, S(0)};
  }
};
// A loss whose second derivatives are zero wherever they exist: a tangent that is NaN makes none of it.
template <class Terms>
constexpr bool LINEAR = false;
template <class S>
constexpr bool LINEAR<AbsoluteError<S>> = true;
template <class S>
struct SmoothL1 {
  S beta;
  FM_INLINE LossTerms<S> operator()(S z, S y, S) const {
    const S d = z - y, size = d < 0 ? -d : d, sign = sign_(d);
    if (size < beta) return {S(0.5) * d * d / beta, d / beta, S(1) / beta, -d / beta, S(-1) / beta};
    return {size - S(0.5) * beta, sign, S(0), -sign, S(0)};
  }
};
template <class S>
struct Huber {
  S delta;
  FM_INLINE LossTerms<S> operator()(S z, S y, S) const {
    const S d = z - y, size = d < 0 ? -d : d, sign = sign_(d);
    if (size < delta) return {S(0.5) * d * d, d, S(1), -d, S(-1)};
    return {delta * (size - S(0.5) * delta), delta * sign, S(0), -delta * sign, S(0)};
  }
};
template <class S>
struct BinaryCrossEntropy {
  FM_INLINE LossTerms<S> operator()(S z, S y, S pos_weight) const {
    const S s = sigmoid_(-z), weight = S(1) + (pos_weight - S(1)) * y;
    const S softplus = log1p_(exp_(z < 0 ? z : -z)) + (z < 0 ? -z : S(0));
    return {(S(1) - y) * z + weight * softplus, (S(1) - y) - weight * s, weight * s * (S(1) - s),
            (pos_weight - S(1)) * softplus - z, S(-1) - (pos_weight - S(1)) * s};
  }
};

// What a backend that reads no values before it runs makes of a class index out of range: NaN.
template <class S>
FM_INLINE bool out_of_range(const LossCall<S>& l, i64 index) {
  return index < 0 || index >= l.cols;
}

// A position is a row of the output: a whole example, or a pixel of it.
template <class S>
FM_INLINE bool ignored(const LossCall<S>& l, i64 row) {
  return l.spec.class_indices && static_cast<const i64*>(l.target)[row] == l.spec.ignore_index;
}

// What a position counts in the denominator of the mean: 1, the class weight of its index, or 0 if
// it is ignored.
template <class S>
FM_INLINE S position_share(const LossCall<S>& l, i64 row) {
  if (!l.spec.class_indices) return 1;
  if (ignored(l, row)) return 0;
  const i64 y = static_cast<const i64*>(l.target)[row];
  if (out_of_range(l, y)) return log_(S(-1));
  return l.class_weights ? l.class_weights[y] : S(1);
}

// Of an example, all of its positions; of an element-wise loss, whose terms are means already, 1.
template <class S>
FM_INLINE double example_share(const LossCall<S>& l, i64 n) {
  if (l.spec.kind != LossKind::cross_entropy || l.rows == 1) return double(position_share(l, n));
  if (!l.spec.class_indices) return double(l.rows);
  double share = 0;
  for (i64 row = n * l.rows; row < (n + 1) * l.rows; ++row) share += double(position_share(l, row));
  return share;
}

// Whether a mean by weights has none to go by. Numbers below the smallest normal one may be read as
// zero.
template <class S>
FM_INLINE bool weightless(const LossCall<S>& l) {
  if (l.spec.sum || !l.spec.normalise_sum || !l.weights) return false;
  constexpr double tiny = sizeof(S) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308;
  for (i64 n = 0; n < l.examples; ++n)
    if (!(double(l.weights[n]) < tiny && double(l.weights[n]) > -tiny)) return false;
  return true;
}

// Infinity where nothing counts: every term, and every derivative, is zero then.
template <class S>
double loss_denominator(const LossCall<S>& l) {
  if (l.spec.sum) return 1;
  const bool weighted = l.spec.normalise_sum && l.weights;
  if (!l.spec.class_indices && !weighted)
    return double(l.examples) * (l.spec.kind == LossKind::cross_entropy ? double(l.rows) : 1.0);
  if (weightless(l)) return -log_(0.0);
  double d = 0;
  for (i64 n = 0; n < l.examples; ++n) d += example_share(l, n) * (weighted ? double(l.weights[n]) : 1.0);
  return d;
}

// Weight q of class c in -sum_c q_c log p_c at position `row`; `y` is where its probability of that
// class stands.
template <class S>
FM_INLINE S class_share(const LossCall<S>& l, i64 row, i64 c, i64 in_target) {
  const S smoothing = S(l.spec.label_smoothing), weight = l.class_weights ? l.class_weights[c] : S(1);
  S y;
  if (l.spec.class_indices) {
    const i64 index = static_cast<const i64*>(l.target)[row];
    if (out_of_range(l, index)) return log_(S(-1));
    y = index == c ? S(1) : S(0);
  } else {
    y = static_cast<const S*>(l.target)[in_target];
  }
  return weight * (y * (S(1) - smoothing) + smoothing / S(l.cols));
}

// Position `row` of cross_entropy, or its tangent along rz. Returns its loss, or that one's
// tangent. POSITIONS: an example has several.
template <class S, bool TANGENT, bool POSITIONS>
S cross_entropy_position(const LossCall<S>& l, i64 row, S factor, S side_factor) {
  if (ignored(l, row)) {  // nothing depends on it, not even where all are ignored and the mean is 0 / 0
    if (l.dz)
      for (i64 c = 0; c < l.cols; ++c) l.dz[row * l.ld + c] = 0;
    return 0;
  }
  const i64 step = POSITIONS ? l.rows : 1;
  const i64 first = POSITIONS ? row / step * step * l.cols + row % step : row * l.cols;
  const S* z = l.z + row * l.ld;
  const S* rz = TANGENT ? l.rz + row * l.ld : nullptr;
  S top = z[0];
  for (i64 c = 1; c < l.cols; ++c) top = z[c] > top || z[c] != z[c] ? z[c] : top;
  S total = 0, mean_rz = 0;
  for (i64 c = 0; c < l.cols; ++c) {
    const S e = exp_(z[c] - top);
    total += e;
    if (TANGENT) mean_rz += e * rz[c];
  }
  const S log_total = log_(total);
  mean_rz /= total;
  S shares = 0, value = 0;
  for (i64 c = 0; c < l.cols; ++c) {
    const S q = class_share(l, row, c, first + c * step);
    shares += q;
    if (q != 0) value -= q * (TANGENT ? rz[c] - mean_rz : z[c] - top - log_total);
  }
  const S target_factor = -side_factor * (S(1) - S(l.spec.label_smoothing));
  for (i64 c = 0; c < l.cols; ++c) {
    const S p = exp_(z[c] - top) / total;
    if (l.dz)
      l.dz[row * l.ld + c] = factor * (TANGENT ? p * (rz[c] - mean_rz) * shares
                                               : p * shares - class_share(l, row, c, first + c * step));
    if (l.dtarget)
      l.dtarget[first + c * step] += target_factor * (l.class_weights ? l.class_weights[c] : S(1)) *
                                     (TANGENT ? rz[c] - mean_rz : z[c] - top - log_total);
  }
  return value;
}

template <class S, bool TANGENT, class Terms>
FM_INLINE S elementwise_example(const LossCall<S>& l, const Terms& terms, i64 n, S share, S factor,
                                S side_factor) {
  const S* const target = static_cast<const S*>(l.target);
  S value = 0;
  const auto element = [&](i64 in_z, i64 in_target, i64 c) FM_INLINE_LAMBDA {
    const S pos_weight = l.class_weights ? l.class_weights[c] : S(1);
    const LossTerms<S> t = terms(l.z[in_z], target[in_target], pos_weight);
    const S rz = TANGENT ? l.rz[in_z] : S(0);
    value += share * (TANGENT ? t.dz * rz : t.value);
    const S second = LINEAR<Terms> ? S(0) : t.dzz * rz, mixed = LINEAR<Terms> ? S(0) : t.dzy * rz;
    if (l.dz) l.dz[in_z] = factor * share * (TANGENT ? second : t.dz);
    if (l.dtarget) l.dtarget[in_target] += side_factor * share * (TANGENT ? mixed : t.dy);
  };
  for (i64 row = n * l.rows; row < (n + 1) * l.rows; ++row) {
    if (l.channels)
      for (i64 c = 0; c < l.cols; ++c)
        element(row * l.ld + c, (n * l.cols + c) * l.rows + row - n * l.rows, row - n * l.rows);
    else if (l.cols == 1)  // not worth the set-up of a vectorised loop
      element(row * l.ld, row, 0);
    else
      for (i64 c = 0; c < l.cols; ++c) element(row * l.ld + c, row * l.cols + c, c);
  }
  return value;
}
