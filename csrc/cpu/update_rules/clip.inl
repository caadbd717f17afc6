// Clipping: g1 = clamp(g, -value, value), g2 = factor g1 with factor = min(1, norm / (|g1| + 1e-6)) for
// each task. A vector of sums has one for each lane: of one task together, or of the task in that
// lane.
template <class S>
FM_INLINE Vec<S> clamped(Vec<S> g, S value) {
  const Vec<S> most = broadcast(value);
  return g > most ? most : (g < -most ? -most : g);
}

// squares[lane] += g1^2
template <class S>
void clip_squares(const ClipCall<S>& c, S* squares) {
  Vec<S> total = Vec<S>{};
  for (i64 i = 0; i < c.n; i += lanes<S>) {
    const Vec<S> g = kept<S>(clamped(load(c.g + i), c.value), mask_at(c.mask, i, c.n));
    total += g * g;
  }
  store(squares, load(squares) + total);
}
// out = g2
template <class S>
void clip(const ClipCall<S>& c, S* out) {
  const Vec<S> factor = c.factor ? load(c.factor) : broadcast(S(1));
  for (i64 i = 0; i < c.n; i += lanes<S>) store(out + i, factor * clamped(load(c.g + i), c.value));
}
// dots[lane] += <dJ/dg2, g1>
template <class S>
void clip_dots(const ClipCall<S>& c, const S* v, S* dots) {
  Vec<S> total = Vec<S>{};
  for (i64 i = 0; i < c.n; i += lanes<S>)
    total += kept<S>(load(v + i) * clamped(load(c.g + i), c.value), mask_at(c.mask, i, c.n));
  store(dots, load(dots) + total);
}
// v = dJ/dg of v = dJ/dg2, given dJ/dg1 = factor v + along g1; returns dJ/dvalue.
template <class S>
double clip_back(const ClipCall<S>& c, const S* along, S* v) {
  const Vec<S> factor = c.factor ? load(c.factor) : broadcast(S(1)), most = broadcast(c.value);
  const Vec<S> more = along ? load(along) : Vec<S>{};
  double by_value = 0;
  for (i64 i = 0; i < c.n; i += lanes<S>) {
    const Vec<S> g = load(c.g + i), keep = mask_at(c.mask, i, c.n);
    const Vec<S> to_g1 = factor * load(v + i) + more * clamped(g, c.value);
    const Vec<S> above = g > most ? to_g1 : Vec<S>{}, below = g < -most ? to_g1 : Vec<S>{};
    by_value += double(sum<S>(kept<S>(above - below, keep)));
    store(v + i, kept<S>(to_g1 - above - below, keep));
  }
  return by_value;
}
