// Pools over windows of channels-last images. The channels of a pixel lie side by side: every loop
// over them is one over vectors.

template <class S>
struct PoolWindow {
  i64 y0, y1, x0, x1;  // clipped to the image
  S share;             // of each pixel, of a mean
};

template <class S>
FM_INLINE PoolWindow<S> pool_window(const Pool<S>& p, i64 oy, i64 ox) {
  if (p.adaptive) {
    const i64 y0 = oy * p.in_h / p.out_h, y1 = ((oy + 1) * p.in_h + p.out_h - 1) / p.out_h;
    const i64 x0 = ox * p.in_w / p.out_w, x1 = ((ox + 1) * p.in_w + p.out_w - 1) / p.out_w;
    return {y0, y1, x0, x1, S(1) / S((y1 - y0) * (x1 - x0))};
  }
  const auto least = [](i64 a, i64 b) { return a < b ? a : b; };
  const auto most = [](i64 a, i64 b) { return a > b ? a : b; };
  const i64 y = oy * p.sh - p.ph, x = ox * p.sw - p.pw;
  // Windows may reach past the padding where their number was rounded up: that part never counts.
  const i64 counted = (least(y + p.kh, p.in_h + p.ph) - y) * (least(x + p.kw, p.in_w + p.pw) - x);
  const i64 y0 = most(y, 0), y1 = least(y + p.kh, p.in_h), x0 = most(x, 0), x1 = least(x + p.kw, p.in_w);
  const i64 divisor = p.divisor ? p.divisor : p.count_padding ? counted : (y1 - y0) * (x1 - x0);
  return {y0, y1, x0, x1, S(1) / S(divisor)};
}

// Calls body(window, first input row of the example, output row) for every window.
template <class S, class Body>
FM_INLINE void each_window(const Pool<S>& p, const Body& body) {
  for (i64 n = 0; n < p.examples; ++n)
    for (i64 oy = 0; oy < p.out_h; ++oy)
      for (i64 ox = 0; ox < p.out_w; ++ox)
        body(pool_window(p, oy, ox), n * p.in_h * p.in_w, (n * p.out_h + oy) * p.out_w + ox);
}

template <class S>
FM_INLINE void clear_image(const Pool<S>& p) {
  if (p.add) return;
  for (i64 r = 0; r < p.examples * p.in_h * p.in_w; ++r) zero_columns(p.to + r * p.ld_to, 0, p.n);
}

// to = the largest of every window, positions = the first pixel that holds it; NaN counts as larger
// than anything.
template <class S>
void max_pool_forward(const Pool<S>& p) {
  each_window(p, [&](const PoolWindow<S>& w, i64 first, i64 row) FM_INLINE_LAMBDA {
    S* __restrict best = p.to + row * p.ld_to;
    int* __restrict at = p.positions + row * p.n;
    for (i64 y = w.y0; y < w.y1; ++y)
      for (i64 x = w.x0; x < w.x1; ++x) {
        const int pixel = int(y * p.in_w + x);
        const S* __restrict from = p.from + (first + pixel) * p.ld_from;
        if (y == w.y0 && x == w.x0) {
          for (i64 c = 0; c < p.n; ++c) best[c] = from[c], at[c] = pixel;
          continue;
        }
        for (i64 c = 0; c < p.n; ++c) {
          const bool larger = from[c] > best[c] || from[c] != from[c];
          best[c] = larger ? from[c] : best[c];
          at[c] = larger ? pixel : at[c];
        }
      }
  });
}

// to = what lies at the positions
template <class S>
void max_pool_gather(const Pool<S>& p) {
  each_window(p, [&](const PoolWindow<S>& w, i64 first, i64 row) FM_INLINE_LAMBDA {
    S* __restrict out = p.to + row * p.ld_to;
    const int* __restrict at = p.positions + row * p.n;
    for (i64 c = 0; c < p.n; ++c) out[c] = 0;
    for (i64 y = w.y0; y < w.y1; ++y)
      for (i64 x = w.x0; x < w.x1; ++x) {
        const int pixel = int(y * p.in_w + x);
        const S* __restrict from = p.from + (first + pixel) * p.ld_from;
        for (i64 c = 0; c < p.n; ++c) out[c] = at[c] == pixel ? from[c] : out[c];
      }
  });
}

// The reverse: every output row is added where its positions say.
template <class S>
void max_pool_scatter(const Pool<S>& p) {
  clear_image(p);
  each_window(p, [&](const PoolWindow<S>& w, i64 first, i64 row) FM_INLINE_LAMBDA {
    const S* __restrict from = p.from + row * p.ld_from;
    const int* __restrict at = p.positions + row * p.n;
    for (i64 y = w.y0; y < w.y1; ++y)
      for (i64 x = w.x0; x < w.x1; ++x) {
        const int pixel = int(y * p.in_w + x);
        S* __restrict out = p.to + (first + pixel) * p.ld_to;
        for (i64 c = 0; c < p.n; ++c) out[c] += at[c] == pixel ? from[c] : S(0);
      }
  });
}

// to = the mean of every window
template <class S>
void avg_pool_gather(const Pool<S>& p) {
  each_window(p, [&](const PoolWindow<S>& w, i64 first, i64 row) FM_INLINE_LAMBDA {
    S* __restrict out = p.to + row * p.ld_to;
    for (i64 c = 0; c < p.n; ++c) out[c] = 0;
    for (i64 y = w.y0; y < w.y1; ++y)
      for (i64 x = w.x0; x < w.x1; ++x) {
        const S* __restrict from = p.from + (first + y * p.in_w + x) * p.ld_from;
        for (i64 c = 0; c < p.n; ++c) out[c] += from[c];
      }
    for (i64 c = 0; c < p.n; ++c) out[c] *= w.share;
  });
}

// Its transpose.
template <class S>
void avg_pool_scatter(const Pool<S>& p) {
  clear_image(p);
  each_window(p, [&](const PoolWindow<S>& w, i64 first, i64 row) FM_INLINE_LAMBDA {
    const S* __restrict from = p.from + row * p.ld_from;
    for (i64 y = w.y0; y < w.y1; ++y)
      for (i64 x = w.x0; x < w.x1; ++x) {
        S* __restrict out = p.to + (first + y * p.in_w + x) * p.ld_to;
        for (i64 c = 0; c < p.n; ++c) out[c] += w.share * from[c];
      }
  });
}
