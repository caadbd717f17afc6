// Norm, relu and max-pool in one: passes over windows that lie side by side, of which only the maximum is kept.
//
//   pooled_forward      out = max of [relu] (constant + from_x (x - center)), positions = the first pixel that holds it
//   pooled_products     sum += sum a, sum_x += sum a (x - center), sum_b += sum b rx at the positions
//   pooled_gather       out = constant + from_x (x - center) [+ from_rx rx] at the positions
//   pooled_combination  out [+]= constant + from_x (x - center) [+ from_rx rx] + pooled terms at the positions

// Calls body(first pixel's row, window's row) for every window of every image.
template <class S, class Body>
FM_INLINE void each_pooled(const PooledColumns<S>& p, const Body& body) {
  for (i64 n = 0; n < p.images; ++n)
    for (i64 y = 0; y < p.out_h; ++y)
      for (i64 x = 0; x < p.out_w; ++x)
        body((n * p.in_h + y * p.kh) * p.in_w + x * p.kw, (n * p.out_h + y) * p.out_w + x);
}

template <class S>
void pooled_forward(const PooledColumns<S>& p) {
  for (i64 j = 0; j < p.n; j += lanes<S>) {
    const Vec<S> center = load(p.center + j), constant = load(p.constant + j), from_x = load(p.from_x + j);
    each_pooled(p, [&](i64 pixel, i64 window) FM_INLINE_LAMBDA {
      Vec<S> best{}, at{};
      for (i64 y = 0; y < p.kh; ++y)
        for (i64 x = 0; x < p.kw; ++x) {
          Vec<S> v = constant + from_x * (load(p.x + (pixel + y * p.in_w + x) * p.ld_x + j) - center);
          if (p.relu) v = v < 0 ? Vec<S>{} : v;
          const Vec<S> place = broadcast(S(y * p.kw + x));
          if (y == 0 && x == 0) {
            best = v;
          } else {
            const auto larger = (v > best) | (v != v);
            best = larger ? v : best;
            at = larger ? place : at;
          }
        }
      store(p.out + window * p.ld_out + j, best);
      store(p.positions + window * p.ld_positions + j, at);
    });
  }
}

// x - center and rx at a window's position.
template <class S>
struct AtMaximum {
  Vec<S> x, rx;
  FM_INLINE AtMaximum(const PooledColumns<S>& p, i64 pixel, i64 window, i64 j) : x{}, rx{} {
    const Vec<S> at = load(p.positions + window * p.ld_positions + j);
    for (i64 y = 0; y < p.kh; ++y)
      for (i64 k = 0; k < p.kw; ++k) {
        const auto here = at == broadcast(S(y * p.kw + k));
        const i64 row = pixel + y * p.in_w + k;
        x = here ? load(p.x + row * p.ld_x + j) : x;
        if (p.rx) rx = here ? load(p.rx + row * p.ld_rx + j) : rx;
      }
    x -= load(p.center + j);
  }
};

template <class S>
FM_INLINE Vec<S> pooled_row(const PooledColumns<S>& p, const S* from, i64 window, i64 j) {
  const Vec<S> value = load(from + window * p.ld_pooled + j);
  return p.mask ? masked<S>(value, load(p.mask + window * p.ld_pooled + j)) : value;
}

template <class S>
void pooled_products(const PooledColumns<S>& p) {
  for (i64 j = 0; j < p.n; j += lanes<S>) {
    Vec<S> sum = load(p.sum + j), sum_x = load(p.sum_x + j), sum_b = p.rx ? load(p.sum_b + j) : Vec<S>{};
    Vec<S> part{}, part_x{}, part_b{};
    each_pooled(p, [&](i64 pixel, i64 window) FM_INLINE_LAMBDA {
      const AtMaximum<S> top(p, pixel, window, j);
      const Vec<S> a = pooled_row(p, p.pooled[0].from, window, j);
      part += a, part_x += a * top.x;
      if (p.rx) part_b += pooled_row(p, p.pooled[1].from, window, j) * top.rx;
      if ((window + 1) % p.out_w == 0) {  // a line of windows is summed by itself
        sum += part, sum_x += part_x, sum_b += part_b;
        part = part_x = part_b = Vec<S>{};
      }
    });
    store(p.sum + j, sum), store(p.sum_x + j, sum_x);
    if (p.rx) store(p.sum_b + j, sum_b);
  }
}

template <class S>
void pooled_gather(const PooledColumns<S>& p) {
  for (i64 j = 0; j < p.n; j += lanes<S>) {
    const Vec<S> constant = load(p.constant + j), from_x = load(p.from_x + j);
    const Vec<S> from_rx = p.rx ? load(p.from_rx + j) : Vec<S>{};
    each_pooled(p, [&](i64 pixel, i64 window) FM_INLINE_LAMBDA {
      const AtMaximum<S> top(p, pixel, window, j);
      Vec<S> out = constant + from_x * top.x;
      if (p.rx) out += from_rx * top.rx;
      if (p.mask) out = masked<S>(out, load(p.mask + window * p.ld_pooled + j));
      store(p.out + window * p.ld_out + j, out);
    });
  }
}

template <class S, bool ALONG>
FM_INLINE void pooled_combine(const PooledColumns<S>& p) {
  for (i64 j = 0; j < p.n; j += lanes<S>) {
    const Vec<S> center = load(p.center + j), constant = load(p.constant + j), from_x = load(p.from_x + j);
    const Vec<S> from_rx = ALONG ? load(p.from_rx + j) : Vec<S>{};
    const Vec<S> first = load(p.pooled[0].coefficients + j);
    const Vec<S> second = p.pooled[1].from ? load(p.pooled[1].coefficients + j) : Vec<S>{};
    const auto pixel_row = [&](i64 row, Vec<S> more) FM_INLINE_LAMBDA {
      Vec<S> sum = constant + from_x * (load(p.x + row * p.ld_x + j) - center) + more;
      if (ALONG) sum += from_rx * load(p.rx + row * p.ld_rx + j);
      S* out = p.out + row * p.ld_out + j;
      store(out, p.add ? load(out) + sum : sum);
    };
    each_pooled(p, [&](i64 pixel, i64 window) FM_INLINE_LAMBDA {
      Vec<S> more = first * pooled_row(p, p.pooled[0].from, window, j);
      if (p.pooled[1].from) more += second * pooled_row(p, p.pooled[1].from, window, j);
      const Vec<S> at = load(p.positions + window * p.ld_positions + j);
      for (i64 y = 0; y < p.kh; ++y)
        for (i64 x = 0; x < p.kw; ++x)
          pixel_row(pixel + y * p.in_w + x, at == broadcast(S(y * p.kw + x)) ? more : Vec<S>{});
    });
    // pixels that no window covers
    for (i64 n = 0; n < p.images; ++n)
      for (i64 y = 0; y < p.in_h; ++y)
        for (i64 x = y < p.out_h * p.kh ? p.out_w * p.kw : 0; x < p.in_w; ++x)
          pixel_row((n * p.in_h + y) * p.in_w + x, Vec<S>{});
  }
}

template <class S>
void pooled_combination(const PooledColumns<S>& p) {
  p.rx ? pooled_combine<S, true>(p) : pooled_combine<S, false>(p);
}
