// Norms of groups of `rows` consecutive rows, each normalised as one: the formulas of
// families/channel_norm.h with a weight for every element of a group. Where the mean of a group is
// not taken away, all means are zero but those of products with x^.

// The sum of term(r, c) over a group, by a line of partial sums.
template <class S, class Term>
FM_INLINE S group_sum(i64 rows, i64 cols, const Term& term) {
  constexpr i64 W = lane_pad<S>;
  S part[W] = {}, total = 0;
  for (i64 r = 0; r < rows; ++r) {
    i64 c = 0;
    for (; c + W <= cols; c += W)
      for (i64 l = 0; l < W; ++l) part[l] += term(r, c + l);
    for (; c < cols; ++c) total += term(r, c);
  }
  for (i64 l = 0; l < W; ++l) total += part[l];
  return total;
}

// One group: where it lies, and its statistics. CENTRED: its mean is taken away first.
template <class S, bool CENTRED>
struct NormGroup {
  const LayerNorm<S>& n;
  const S *x, *dy, *rx, *rdy;
  S mean, rstd;

  FM_INLINE NormGroup(const LayerNorm<S>& call, i64 g)
      : n(call),
        x(call.x + g * call.rows * call.ld_x),
        dy(call.dy ? call.dy + g * call.rows * call.ld : nullptr),
        rx(call.rx ? call.rx + g * call.rows * call.ld_rx : nullptr),
        rdy(call.rdy ? call.rdy + g * call.rows * call.ld : nullptr),
        mean(call.state[2 * g]),
        rstd(call.state[2 * g + 1]) {}
  FM_INLINE S hat(i64 r, i64 c) const { return (x[r * n.ld_x + c] - mean) * rstd; }
  FM_INLINE S w(i64 r, i64 c) const { return n.w ? n.w[r * n.cols + c] : S(1); }
  FM_INLINE S vw(i64 r, i64 c) const { return n.vw ? n.vw[r * n.cols + c] : S(0); }
  FM_INLINE S g(i64 r, i64 c) const { return w(r, c) * dy[r * n.ld + c]; }
  FM_INLINE S rg(i64 r, i64 c) const { return w(r, c) * rdy[r * n.ld + c] + vw(r, c) * dy[r * n.ld + c]; }
  FM_INLINE S moved(i64 r, i64 c) const { return rx ? rx[r * n.ld_rx + c] : S(0); }
  // The mean of term over the group.
  template <class Term>
  FM_INLINE S average(const Term& term) const {
    return group_sum<S>(n.rows, n.cols, term) / S(n.rows * n.cols);
  }
  // The same of what is taken away.
  template <class Term>
  FM_INLINE S level(const Term& term) const {
    if constexpr (CENTRED) return average(term);
    return S(0);
  }
  // out = [out +] element, and zeros after it
  template <class Element>
  FM_INLINE void write(i64 group, const Element& element) const {
    for (i64 r = 0; r < n.rows; ++r) {
      S* out = n.out + (group * n.rows + r) * n.ld_out;
      if (n.add)
        for (i64 c = 0; c < n.cols; ++c) out[c] += element(r, c);
      else
        for (i64 c = 0; c < n.cols; ++c) out[c] = element(r, c);
      for (i64 c = n.cols; c < n.ld_out; ++c) out[c] = 0;
    }
  }
  // Adds to the parameters' gradients.
  template <class Weight, class Bias>
  FM_INLINE void collect(const Weight& weight, const Bias& bias) const {
    for (i64 r = 0; r < n.rows; ++r) {
      if (n.dw)
        for (i64 c = 0; c < n.cols; ++c) n.dw[r * n.cols + c] += weight(r, c);
      if (n.db)
        for (i64 c = 0; c < n.cols; ++c) n.db[r * n.cols + c] += bias(r, c);
    }
  }
};

template <class S, bool CENTRED>
void norm_forward(const LayerNorm<S>& n) {
  for (i64 g = 0; g < n.groups; ++g) {
    n.state[2 * g] = 0, n.state[2 * g + 1] = 1;
    n.state[2 * g] =
        NormGroup<S, CENTRED>(n, g).level([&](i64 r, i64 c) { return n.x[(g * n.rows + r) * n.ld_x + c]; });
    const NormGroup<S, CENTRED> centred(n, g);
    const S var = centred.average([&](i64 r, i64 c) { return centred.hat(r, c) * centred.hat(r, c); });
    n.state[2 * g + 1] = S(1) / sqrt_(var + n.eps);
    const NormGroup<S, CENTRED> at(n, g);
    at.write(g, [&](i64 r, i64 c) { return at.w(r, c) * at.hat(r, c) + (n.b ? n.b[r * n.cols + c] : S(0)); });
  }
}

template <class S, bool CENTRED>
void norm_backward(const LayerNorm<S>& n) {
  for (i64 g = 0; g < n.groups; ++g) {
    const NormGroup<S, CENTRED> at(n, g);
    at.collect([&](i64 r, i64 c) { return at.dy[r * n.ld + c] * at.hat(r, c); },
               [&](i64 r, i64 c) { return at.dy[r * n.ld + c]; });
    if (!n.out) continue;
    const S mean = at.level([&](i64 r, i64 c) { return at.g(r, c); });
    const S mean_x = at.average([&](i64 r, i64 c) { return at.g(r, c) * at.hat(r, c); });
    at.write(g, [&](i64 r, i64 c) { return at.rstd * (at.g(r, c) - mean - at.hat(r, c) * mean_x); });
  }
}

template <class S, bool CENTRED>
void norm_tangent(const LayerNorm<S>& n) {
  for (i64 g = 0; g < n.groups; ++g) {
    const NormGroup<S, CENTRED> at(n, g);
    const S t = n.rx ? at.level([&](i64 r, i64 c) { return at.moved(r, c); }) : S(0);
    const S t_x = n.rx ? at.average([&](i64 r, i64 c) { return at.moved(r, c) * at.hat(r, c); }) : S(0);
    at.write(g, [&](i64 r, i64 c) {
      const S rhat = at.rstd * (at.moved(r, c) - t - at.hat(r, c) * t_x);
      return at.w(r, c) * rhat + at.vw(r, c) * at.hat(r, c) + (n.vb ? n.vb[r * n.cols + c] : S(0));
    });
  }
}

template <class S, bool CENTRED>
void norm_tangent_backward(const LayerNorm<S>& n) {
  for (i64 g = 0; g < n.groups; ++g) {
    const NormGroup<S, CENTRED> at(n, g);
    const S t = n.rx ? at.level([&](i64 r, i64 c) { return at.moved(r, c); }) : S(0);
    const S t_x = n.rx ? at.average([&](i64 r, i64 c) { return at.moved(r, c) * at.hat(r, c); }) : S(0);
    const auto rhat = [&](i64 r, i64 c)
                          FM_INLINE_LAMBDA { return at.rstd * (at.moved(r, c) - t - at.hat(r, c) * t_x); };
    at.collect(
        [&](i64 r, i64 c) { return at.rdy[r * n.ld + c] * at.hat(r, c) + at.dy[r * n.ld + c] * rhat(r, c); },
        [&](i64 r, i64 c) { return at.rdy[r * n.ld + c]; });
    if (!n.out) continue;
    const S mean = at.level([&](i64 r, i64 c) { return at.g(r, c); });
    const S mean_x = at.average([&](i64 r, i64 c) { return at.g(r, c) * at.hat(r, c); });
    const S u = at.level([&](i64 r, i64 c) { return at.rg(r, c); });
    const S u_x =
        at.average([&](i64 r, i64 c) { return at.rg(r, c) * at.hat(r, c) + at.g(r, c) * rhat(r, c); });
    at.write(g, [&](i64 r, i64 c) {
      const S dx = at.rstd * (at.g(r, c) - mean - at.hat(r, c) * mean_x);
      return at.rstd * (at.rg(r, c) - u - rhat(r, c) * mean_x - at.hat(r, c) * u_x - t_x * dx);
    });
  }
}

template <class S>
void layer_norm_forward(const LayerNorm<S>& n) {
  n.centred ? norm_forward<S, true>(n) : norm_forward<S, false>(n);
}
template <class S>
void layer_norm_backward(const LayerNorm<S>& n) {
  n.centred ? norm_backward<S, true>(n) : norm_backward<S, false>(n);
}
template <class S>
void layer_norm_tangent(const LayerNorm<S>& n) {
  n.centred ? norm_tangent<S, true>(n) : norm_tangent<S, false>(n);
}
template <class S>
void layer_norm_tangent_backward(const LayerNorm<S>& n) {
  n.centred ? norm_tangent_backward<S, true>(n) : norm_tangent_backward<S, false>(n);
}
