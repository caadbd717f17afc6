// Passes over parameter vectors (padded lengths): sums, inner products and the update rules.

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

// m' = mu m + g + omega theta;  theta' = theta - alpha m'
template <class S>
void sgd_update(i64 n, S mu, S omega, S alpha, const S* alphas, const S* theta, const S* g, const S* m,
                S* next, S* next_m) {
  for (i64 i = 0; i < n; ++i) {
    S u = g[i];
    if (omega != 0) u += omega * theta[i];
    if (m) u += mu * m[i];
    if (next_m) next_m[i] = u;
    next[i] = theta[i] - (alphas ? alphas[i] : alpha) * u;
  }
}

// v = mbar - alpha lambda
template <class S>
void sgd_direction(i64 n, S alpha, const S* alphas, const S* lambda, const S* mbar, S* v) {
  for (i64 i = 0; i < n; ++i) v[i] = (mbar ? mbar[i] : S(0)) - (alphas ? alphas[i] : alpha) * lambda[i];
}

// lambda += omega v;  mbar = mu v
template <class S>
void sgd_adjoint(i64 n, S mu, S omega, const S* v, S* lambda, S* mbar) {
  for (i64 i = 0; i < n; ++i) {
    if (omega != 0) lambda[i] += omega * v[i];
    if (mbar) mbar[i] = mu * v[i];
  }
}
