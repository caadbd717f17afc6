// Passes over parameter vectors (padded lengths): sums, inner products, plain SGD.

template <class S>
void add(i64 n, const S* a, const S* b, S* out) {
  for (i64 i = 0; i < n; ++i) out[i] = b ? a[i] + b[i] : a[i];
}

template <class S>
double inner(i64 n, const S* a, const S* b) {
  double total = 0;
  for (i64 i = 0; i < n; i += lane_pad<S>) {
    S part = 0;
    for (i64 j = 0; j < lane_pad<S>; ++j) part += a[i + j] * b[i + j];
    total += double(part);
  }
  return total;
}

// theta' = theta - alpha g
template <class S>
void sgd_update(i64 n, S alpha, const S* alphas, const S* theta, const S* g, S* next, S* next_g) {
  for (i64 i = 0; i < n; ++i) {
    if (next_g) next_g[i] = g[i];
    next[i] = theta[i] - (alphas ? alphas[i] : alpha) * g[i];
  }
}

// v = start - alpha lambda
template <class S>
void sgd_direction(i64 n, S alpha, const S* alphas, const S* lambda, const S* start, S* v) {
  for (i64 i = 0; i < n; ++i) v[i] = (start ? start[i] : S(0)) - (alphas ? alphas[i] : alpha) * lambda[i];
}
