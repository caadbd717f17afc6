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

// to[i] = from[i], or += it, of rows that lie in one piece. Nothing past their end is touched: what
// comes next may be a row of another index.
template <class S, bool ADDS>
FM_INLINE void move_row(S* to, const S* from, i64 width) {
  constexpr int L = lanes<S>;
  i64 i = 0;
  for (; i + L <= width; i += L) {
    const Vec<S> x = load(from + i);
    store(to + i, ADDS ? load(to + i) + x : x);
  }
  for (; i < width; ++i) to[i] = ADDS ? to[i] + from[i] : from[i];
}

template <class S, bool ADDS>
FM_INLINE void move_elements(S* to, i64 to_step, const S* from, i64 from_step, i64 width) {
  if (to_step == 1 && from_step == 1) {
    move_row<S, ADDS>(to, from, width);
    return;
  }
  for (i64 i = 0; i < width; ++i)
    to[i * to_step] = ADDS ? to[i * to_step] + from[i * from_step] : from[i * from_step];
}

// Whole rows, one for each integer of the user's, all of them in one piece.
template <class S, bool SCATTER, bool ADDS>
FM_INLINE void move_rows(const machine::Step& s, machine::Memory<S>& m, i64 rows, i64 width) {
  const machine::View &out = s.views[0], &source = s.views[1], &index = s.views[2];
  const bool one = s.dims == 1;  // row
  const i64 to_next = one ? 0 : out.stride[0], from_next = one ? 0 : source.stride[0],
            index_next = one ? 0 : index.stride[0], limit = s.limit, step = s.step;
  S* to = m.at[out.space] + out.offset;
  const S* from = m.at[source.space] + source.offset;
  const i64* at = m.ints + index.offset;
  for (i64 r = 0; r < rows; ++r, to += to_next, from += from_next, at += index_next) {
    i64 i = *at;
    if (s.wraps && i < 0) i += limit;
    if (i < 0 || i >= limit) m.bad_index = true, i = 0;
    move_row<S, ADDS>(SCATTER ? to + i * step : to, SCATTER ? from : from + i * step, width);
  }
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
  if (s.dims <= 2 && index_step == 0 && to_step == 1 && from_step == 1 && index.space == int(Space::ints)) {
    if (SCATTER && s.accumulate)
      move_rows<S, SCATTER, true>(s, m, rows, width);
    else
      move_rows<S, SCATTER, false>(s, m, rows, width);
    return;
  }
  i64 place[MOST_DIMS] = {}, at_out = out.offset, at_source = source.offset, at_index = index.offset;
  for (i64 r = 0; r < rows; ++r) {
    S* const to = m.at[out.space] + at_out;
    const S* const from = m.at[source.space] + at_source;
    if (index_step == 0) {
      const i64 moved = checked_index(s, m, at_index) * s.step;
      S* const t = SCATTER ? to + moved : to;
      const S* const f = SCATTER ? from : from + moved;
      if (SCATTER && s.accumulate)
        move_elements<S, true>(t, to_step, f, from_step, width);
      else
        move_elements<S, false>(t, to_step, f, from_step, width);
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

template <class S>
void add_rows(i64 n, i64 width, const i64* rows, const S* x, S* out) {
  for (i64 i = 0; i < n; ++i) move_row<S, true>(out + rows[i] * width, x + i * width, width);
}
