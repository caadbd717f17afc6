// Gathers and scatters by indices that are numbers of the program or integers of the user's.

template <class S>
FM_INLINE i64 checked_index(const machine::Step& s, machine::Memory<S>& m, i64 at) {
  const machine::View& index = s.views[2];
  i64 i;
  if (index.space == int(machine::Space::ints)) {
    i = m.ints[at];
  } else {
    const S x = m.at[index.space][at];
    i = x > S(-9e15) && x < S(9e15) ? i64(x) : -(i64(1) << 62);
  }
  if (s.wraps && i < 0) i += s.limit;
  if (i >= 0 && i < s.limit) return i;
  m.bad_index = true;
  return 0;
}

template <class S, bool SCATTER>
void run_gather(const machine::Step& s, machine::Memory<S>& m) {
  using namespace machine;
  const View &out = s.views[0], &source = s.views[1], &index = s.views[2];
  const int last = s.dims - 1;
  const i64 width = s.n[last], to_step = out.stride[last], from_step = source.stride[last],
            index_step = index.stride[last];
  i64 rows = 1;
  for (int d = 0; d < last; ++d) rows *= s.n[d];
  i64 place[MOST_DIMS] = {}, at_out = out.offset, at_source = source.offset, at_index = index.offset;
  for (i64 r = 0; r < rows; ++r) {
    S* const to = m.at[out.space] + at_out;
    const S* const from = m.at[source.space] + at_source;
    if (index_step == 0) {
      const i64 moved = checked_index(s, m, at_index) * s.step;
      S* const t = SCATTER ? to + moved : to;
      const S* const f = SCATTER ? from : from + moved;
      if (SCATTER && s.accumulate)
        for (i64 i = 0; i < width; ++i) t[i * to_step] += f[i * from_step];
      else
        for (i64 i = 0; i < width; ++i) t[i * to_step] = f[i * from_step];
    } else {
      for (i64 i = 0; i < width; ++i) {
        const i64 moved = checked_index(s, m, at_index + i * index_step) * s.step;
        if (!SCATTER)
          to[i * to_step] = from[i * from_step + moved];
        else if (s.accumulate)
          to[i * to_step + moved] += from[i * from_step];
        else
          to[i * to_step + moved] = from[i * from_step];
      }
    }
    for (int d = last - 1; d >= 0; --d) {
      at_out += out.stride[d], at_source += source.stride[d], at_index += index.stride[d];
      if (++place[d] < s.n[d]) break;
      at_out -= place[d] * out.stride[d], at_source -= place[d] * source.stride[d],
          at_index -= place[d] * index.stride[d];
      place[d] = 0;
    }
  }
}
