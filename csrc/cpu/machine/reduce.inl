// Sums and maxima over the last dimensions of a loop.

// Calls body(offset of x) for every index of the reduced dimensions but `skip` of the last ones.
template <class Body>
FM_INLINE void for_each_reduced(const machine::Step& s, const machine::View& x, int skip, const Body& body) {
  const int first = s.dims - s.reduced, last = s.dims - skip;
  i64 index[machine::MOST_DIMS] = {}, at = 0, count = 1;
  for (int d = first; d < last; ++d) count *= s.n[d];
  for (i64 i = 0; i < count; ++i) {
    body(at);
    for (int d = last - 1; d >= first; --d) {
      at += x.stride[d];
      if (++index[d] < s.n[d]) break;
      at -= index[d] * x.stride[d];
      index[d] = 0;
    }
  }
}

template <class S, bool MAX>
FM_INLINE Vec<S> joined(Vec<S> a, Vec<S> b) {
  if constexpr (MAX) return (b > a) | (b != b) ? b : a;
  return a + b;
}
template <class S, bool MAX>
FM_INLINE S joined_numbers(S a, S b) {
  if constexpr (MAX) return b > a || b != b ? b : a;
  return a + b;
}

// Long sums are added up in parts of this many, which keeps their error small.
constexpr i64 SUM_PART = 64;

// [width] elements side by side, each over all reduced indices.
template <class S, bool MAX, int NV>
FM_INLINE void reduce_columns(const machine::Step& s, const machine::View& x, const S* from, S* to,
                              i64 left) {
  constexpr int L = lanes<S>;
  const Vec<S> start = MAX ? broadcast(S(-__builtin_inf())) : Vec<S>{};
  Vec<S> acc[NV], part[NV];
  for (int v = 0; v < NV; ++v) acc[v] = part[v] = start;
  i64 count = 0;
  for_each_reduced(s, x, 0, [&](i64 at) {
    for (int v = 0; v < NV; ++v) part[v] = joined<S, MAX>(part[v], load(from + at + v * L));
    if (++count == SUM_PART) {
      for (int v = 0; v < NV; ++v) acc[v] = joined<S, MAX>(acc[v], part[v]), part[v] = start;
      count = 0;
    }
  });
  for (int v = 0; v < NV; ++v) {
    Vec<S> total = joined<S, MAX>(acc[v], part[v]);
    if (left >= L) {
      if (s.accumulate) total += load(to + v * L);
      store(to + v * L, total);
    } else {
      for (int i = 0; i < left; ++i) to[v * L + i] = s.accumulate ? to[v * L + i] + total[i] : total[i];
    }
    left -= L;
  }
}

template <class S, bool MAX>
FM_INLINE S reduce_rows(const machine::Step& s, const machine::View& x, const S* from) {
  constexpr int L = lanes<S>;
  const i64 width = s.n[s.dims - 1], stride = x.stride[s.dims - 1];
  const S start = MAX ? S(-__builtin_inf()) : S(0);
  S total = start;
  Vec<S> acc = broadcast(start);
  bool vectors = false;
  for_each_reduced(s, x, 1, [&](i64 at) {
    i64 i = 0;
    if (stride == 1 && width >= L) {
      vectors = true;
      Vec<S> part = broadcast(start);
      for (i64 n = 0; i + L <= width; i += L) {
        part = joined<S, MAX>(part, load(from + at + i));
        if (++n == SUM_PART) acc = joined<S, MAX>(acc, part), part = broadcast(start), n = 0;
      }
      acc = joined<S, MAX>(acc, part);
    }
    for (; i < width; ++i) total = joined_numbers<S, MAX>(total, from[at + i * stride]);
  });
  if (vectors)
    for (int i = 0; i < L; ++i) total = joined_numbers<S, MAX>(total, acc[i]);
  return total;
}

template <class S>
FM_INLINE S first_maximum(const machine::Step& s, const machine::View& x, const S* from, i64 base) {
  const int first = s.dims - s.reduced;
  i64 index[machine::MOST_DIMS] = {}, best = base, place = base;
  S most = 0;
  bool any = false;
  for_each_reduced(s, x, 0, [&](i64 at) {
    const S value = from[at];
    if (!any || value > most || (value != value && most == most)) most = value, best = place, any = true;
    for (int d = s.dims - 1; d >= first; --d) {
      place += s.steps[d];
      if (++index[d] < s.n[d]) break;
      place -= index[d] * s.steps[d];
      index[d] = 0;
    }
  });
  return S(best);
}

template <class S, bool MAX>
void reduce_as(const machine::Step& s, machine::Memory<S>& m) {
  using namespace machine;
  constexpr int L = lanes<S>;
  const View &x = s.views[0], &out = s.views[1];
  const S* const from = m.at[x.space] + x.offset;
  S* const to = m.at[out.space] + out.offset;
  const int kept = s.dims - s.reduced;
  const int last = kept - 1;
  const bool columns = s.reduction != Reduction::argmax && kept > 0 && x.stride[last] == 1 &&
                       out.stride[last] == 1 && s.n[last] > 1 &&
                       (s.n[last] >= L || x.stride[s.dims - 1] != 1);
  i64 outer = 1;
  for (int d = 0; d < (columns ? last : kept); ++d) outer *= s.n[d];
  i64 index[MOST_DIMS] = {}, at_x = 0, at_out = 0, place = s.start;
  for (i64 q = 0; q < outer; ++q) {
    if (s.reduction == Reduction::argmax) {
      to[at_out] = first_maximum(s, x, from + at_x, place);
    } else if (columns) {
      i64 i = 0;
      for (; i + 4 * L <= s.n[last]; i += 4 * L)
        reduce_columns<S, MAX, 4>(s, x, from + at_x + i, to + at_out + i, 4 * L);
      for (; i < s.n[last]; i += L)
        reduce_columns<S, MAX, 1>(s, x, from + at_x + i, to + at_out + i, s.n[last] - i);
    } else {
      const S total = reduce_rows<S, MAX>(s, x, from + at_x);
      to[at_out] = s.accumulate ? to[at_out] + total : total;
    }
    for (int d = (columns ? last : kept) - 1; d >= 0; --d) {
      at_x += x.stride[d], at_out += out.stride[d], place += s.steps[d];
      if (++index[d] < s.n[d]) break;
      at_x -= index[d] * x.stride[d], at_out -= index[d] * out.stride[d], place -= index[d] * s.steps[d];
      index[d] = 0;
    }
  }
}

template <class S>
void run_reduce(const machine::Step& s, machine::Memory<S>& m) {
  if (s.reduction == machine::Reduction::max)
    reduce_as<S, true>(s, m);
  else if (s.reduction == machine::Reduction::sum)
    reduce_as<S, false>(s, m);
  else {
    machine::Step plain = s;  // argmax goes element by element
    reduce_as<S, false>(plain, m);
  }
}
