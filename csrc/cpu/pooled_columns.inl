// Norm, relu and max-pool in one: passes over windows that lie side by side, of which only the
// maximum is kept.
//
//   pooled_forward      out = max of [relu] (constant + from_x (x - center)), positions = the first
// pixel that holds   it,
//                       maxima = x there
//   pooled_pick         maxima = rx at the positions
//   pooled_combination  out [+]= constant + from_x (x - center) [+ from_rx rx] + pooled terms at
// the positions

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
      Vec<S> best{}, at{}, kept{};
      for (i64 y = 0; y < p.kh; ++y)
        for (i64 x = 0; x < p.kw; ++x) {
          const Vec<S> from = load(p.x + (pixel + y * p.in_w + x) * p.ld_x + j);
          Vec<S> v = constant + from_x * (from - center);
          if (p.relu) v = v < 0 ? Vec<S>{} : v;
          const Vec<S> place = broadcast(S(y * p.kw + x));
          if (y == 0 && x == 0) {
            best = v, kept = from;
          } else {
            const auto larger = (v > best) | (v != v);
            best = larger ? v : best;
            at = larger ? place : at;
            kept = larger ? from : kept;
          }
        }
      store(p.out + window * p.ld_out + j, best);
      store(p.positions + window * p.ld_positions + j, at);
      store(p.maxima + window * p.ld_positions + j, kept);
    });
  }
}

template <class S>
void pooled_pick(const PooledColumns<S>& p) {
  for (i64 j = 0; j < p.n; j += lanes<S>)
    each_pooled(p, [&](i64 pixel, i64 window) FM_INLINE_LAMBDA {
      const Vec<S> at = load(p.positions + window * p.ld_positions + j);
      Vec<S> kept{};
      for (i64 y = 0; y < p.kh; ++y)
        for (i64 x = 0; x < p.kw; ++x)
          kept =
              at == broadcast(S(y * p.kw + x)) ? load(p.rx + (pixel + y * p.in_w + x) * p.ld_rx + j) : kept;
      store(p.maxima + window * p.ld_positions + j, kept);
    });
}

template <class S>
FM_INLINE Vec<S> pooled_row(const PooledColumns<S>& p, const S* from, i64 window, i64 j) {
  const Vec<S> value = load(from + window * p.ld_pooled + j);
  return p.mask ? masked<S>(value, load(p.mask + window * p.ld_pooled + j)) : value;
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
