// Maps: a chain of element-wise functions over blocks of the loop, temporaries in the first-level
// cache.

// One argument for the block at hand: vector v is at p + v * step; step 0 is one vector for all.
template <class S>
struct MapArgument {
  S* p;
  i64 step;
};

// Walks over the rows of a loop nest, all dimensions but the last.
struct RowWalk {
  i64 index[machine::MOST_DIMS] = {};
  FM_INLINE void to(const machine::Step& s, i64 row) {
    for (int d = s.dims - 2; d >= 0; --d) index[d] = row % s.n[d], row /= s.n[d];
  }
  FM_INLINE i64 offset(const machine::Step& s, const machine::View& v) const {
    i64 at = 0;
    for (int d = 0; d < s.dims - 1; ++d) at += index[d] * v.stride[d];
    return at;
  }
  // On to the next row; moves `at` along for one view.
  FM_INLINE i64 next(const machine::Step& s, const machine::View& v, i64 at) {
    for (int d = s.dims - 2; d >= 0; --d) {
      at += v.stride[d];
      if (++index[d] < s.n[d]) return at;
      at -= index[d] * v.stride[d];
      index[d] = 0;
    }
    return at;
  }
};

template <class S, class T>
FM_INLINE void read_row(const T* from, i64 stride, i64 n, S* to) {
  if constexpr (sizeof(T) == sizeof(S) && T(0.5) == T(0.5) && T(0.5) != T(0))
    if (stride == 1) {
      for (i64 i = 0; i < n; i += lanes<S>) store(to + i, load(from + i));
      return;
    }
  if (stride == 0) {
    const Vec<S> x = broadcast(S(*from));
    for (i64 i = 0; i < n; i += lanes<S>) store(to + i, x);
    return;
  }
  for (i64 i = 0; i < n; ++i) to[i] = S(from[i * stride]);
}
template <class S>
FM_INLINE void write_row(const S* from, S* to, i64 stride, i64 n) {
  if (stride != 1) {
    for (i64 i = 0; i < n; ++i) to[i * stride] = from[i];
    return;
  }
  i64 i = 0;
  for (; i + lanes<S> <= n; i += lanes<S>) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = from[i];
}

template <class S>
FM_INLINE Vec<S> truth(VecMask<S> mask) {
  return mask ? broadcast(S(1)) : Vec<S>{};
}

template <class S, machine::MapFunction F>
FM_INLINE Vec<S> map_value(Vec<S> a, Vec<S> b, Vec<S> c) {
  using M = machine::MapFunction;
  const Vec<S> zero = {};
  if constexpr (F == M::copy) return a;
  if constexpr (F == M::add) return a + b;
  if constexpr (F == M::sub) return a - b;
  if constexpr (F == M::mul) return a * b;
  if constexpr (F == M::div) return a / b;
  if constexpr (F == M::max) return (a > b) | (a != a) ? a : b;
  if constexpr (F == M::min) return (a < b) | (a != a) ? a : b;
  if constexpr (F == M::lt) return truth<S>(a < b);
  if constexpr (F == M::le) return truth<S>(a <= b);
  if constexpr (F == M::eq) return truth<S>(a == b);
  if constexpr (F == M::ne) return truth<S>(a != b);
  if constexpr (F == M::gate) return a <= zero ? zero : b;
  if constexpr (F == M::where) return a != zero ? b : c;
  if constexpr (F == M::neg) return -a;
  if constexpr (F == M::relu) return a < zero ? zero : a;
  if constexpr (F == M::sign) return a > zero ? broadcast(S(1)) : (a < zero ? broadcast(S(-1)) : a);
  if constexpr (F == M::abs) return abs_(a);
  if constexpr (F == M::sqrt) return sqrt_(a);
  if constexpr (F == M::floor) return floor_(a);
  if constexpr (F == M::ceil) return -floor_(-a);
  if constexpr (F == M::trunc) return a < zero ? -floor_(-a) : floor_(a);
  if constexpr (F == M::round) return round_(a);
  if constexpr (F == M::exp) return exp_(a);
  if constexpr (F == M::expm1) return expm1_(a);
  if constexpr (F == M::log) return log_(a);
  if constexpr (F == M::log1p) return log1p_(a);
  if constexpr (F == M::tanh) return tanh_(a);
  if constexpr (F == M::sigmoid) return sigmoid_(a);
  if constexpr (F == M::sin) return sin_(a);
  if constexpr (F == M::cos) return cos_(a);
  if constexpr (F == M::erf) return erf_(a);
  if constexpr (F == M::pow) return pow_(a, b);
  if constexpr (F == M::atan2) return atan2_(a, b);
}

constexpr int arity(machine::MapFunction f) {
  using M = machine::MapFunction;
  if (f == M::where) return 3;
  return (f >= M::add && f <= M::gate) || f == M::atan2 ? 2 : 1;
}

// Not inlined: one loop for each function, whose code is small.
template <class S, machine::MapFunction F>
__attribute__((noinline)) void map_loop(const MapArgument<S>& to, const MapArgument<S>& a,
                                        const MapArgument<S>& b, const MapArgument<S>& c, i64 vectors) {
  constexpr int L = lanes<S>;
  for (i64 v = 0; v < vectors; ++v) {
    const Vec<S> x = load(a.p + v * a.step);
    Vec<S> y = x, z = x;
    if constexpr (arity(F) > 1) y = load(b.p + v * b.step);
    if constexpr (arity(F) > 2) z = load(c.p + v * c.step);
    store(to.p + v * L, map_value<S, F>(x, y, z));
  }
}

template <class S>
FM_INLINE void map_op(const machine::MicroOp& o, const MapArgument<S>* args, i64 vectors) {
  switch (machine::MapFunction(o.op)) {
#define FM_CASE(name)              \
  case machine::MapFunction::name: \
    return map_loop<S, machine::MapFunction::name>(args[o.to], args[o.a], args[o.b], args[o.c], vectors);
    FM_MACHINE_FUNCTIONS(FM_CASE)
#undef FM_CASE
  }
}

// A copy of a matrix whose rows lie across: by blocks through registers.
template <class S>
FM_INLINE bool transposed_copy(const machine::Step& s, machine::Memory<S>& m) {
  const machine::View &in = s.views[0], &out = s.views[1];
  if (s.dims < 2 || s.inputs != 1 || s.outputs != 1 || s.op_count != 1 ||
      s.ops[0].op != int(machine::MapFunction::copy) || in.space == int(machine::Space::ints))
    return false;
  const int r = s.dims - 2, c = s.dims - 1;
  if (in.stride[r] != 1 || out.stride[c] != 1 || in.stride[c] == 1 || s.n[r] < 4 || s.n[c] < 4) return false;
  i64 outer = 1;
  for (int d = 0; d < r; ++d) outer *= s.n[d];
  for (i64 q = 0; q < outer; ++q) {
    const S* from = m.at[in.space] + in.offset;
    S* to = m.at[out.space] + out.offset;
    i64 rest = q;
    for (int d = r - 1; d >= 0; --d) {
      const i64 i = rest % s.n[d];
      rest /= s.n[d];
      from += i * in.stride[d], to += i * out.stride[d];
    }
    constexpr int B = block_side<S>;
    const i64 ld_src = in.stride[c], ld_dst = out.stride[r], whole = s.n[r] / B * B;
    // src[j, i] = from[j * ld_src + i] goes to to[i * ld_dst + j]
    i64 j = 0;
    for (; j + B <= s.n[c]; j += B) {
      transpose_strip(from + j * ld_src, ld_src, to + j, ld_dst, whole / B);
      if (whole < s.n[r])
        transpose_edge(from + j * ld_src + whole, ld_src, to + whole * ld_dst + j, ld_dst, i64(B),
                       s.n[r] - whole, false);
    }
    if (j < s.n[c]) transpose_edge(from + j * ld_src, ld_src, to + j, ld_dst, s.n[c] - j, s.n[r], false);
  }
  return true;
}

// Rows at least this long are blocks of their own: then nothing that lies in rows is copied.
constexpr i64 LONG_ROW = 128;

template <class S>
void run_map(const machine::Step& s, machine::Memory<S>& m) {
  using namespace machine;
  constexpr int L = lanes<S>;
  if (transposed_copy(s, m)) return;
  const View *const in = s.views, *const out = in + s.inputs;
  const int first_in = s.temps, first_number = first_in + s.inputs, first_out = first_number + s.numbers;
  MapArgument<S> args[MOST_ARGS];
  S* tile = m.tiles;
  const i64 pitch = s.tile + SLACK;
  for (int i = 0; i < s.temps; ++i, tile += pitch) args[i] = {tile, L};
  for (int i = 0; i < s.numbers; ++i)
    args[first_number + i] = {(S*)(static_cast<const char*>(s.splats) + 64 * i), 0};
  S* in_tile[MOST_ARGS];
  bool all_dense = true;
  for (int i = 0; i < s.inputs; ++i) {
    const View& v = in[i];
    in_tile[i] = tile;
    if (v.uniform && v.space == int(Space::ints)) {
      store(tile, broadcast(S(m.ints[v.offset])));
      args[first_in + i] = {tile, 0};
    } else if (v.uniform && v.stride[s.dims - 1] == 1) {
      args[first_in + i] = {m.at[v.space] + v.offset, 0};
    } else if (v.uniform) {
      store(tile, broadcast(m.at[v.space][v.offset]));
      args[first_in + i] = {tile, 0};
    }
    all_dense = all_dense && (v.uniform || (v.dense && v.space != int(Space::ints)));
    tile += pitch;
  }
  S* out_tile[MOST_ARGS];
  for (int i = 0; i < s.outputs; ++i, tile += pitch)
    out_tile[i] = tile, all_dense = all_dense && out[i].dense;

  const i64 width = s.n[s.dims - 1];
  i64 rows = 1;
  for (int d = 0; d < s.dims - 1; ++d) rows *= s.n[d];
  const i64 total = rows * width;
  // blocks: `height` rows, or parts of one row
  i64 row_length = width, height = 1;
  if (all_dense)
    row_length = total, rows = 1;
  else if (width < LONG_ROW)
    height = s.tile / width > 1 ? s.tile / width : 1;
  RowWalk walk;
  for (i64 row = 0; row < rows; row += height) {
    const i64 high = rows - row < height ? rows - row : height;
    if (!all_dense) walk.to(s, row);
    for (i64 at = 0; at < row_length; at += s.tile) {
      const i64 length = row_length - at < s.tile ? row_length - at : s.tile;
      const i64 count = high * length, vectors = (count + L - 1) / L, linear = row * width + at;
      const bool one_row = high == 1;
      for (int i = 0; i < s.inputs; ++i) {
        const View& v = in[i];
        if (v.uniform) continue;
        const i64 stride = v.stride[s.dims - 1];
        if (v.space == int(Space::ints)) {
          RowWalk own = walk;
          i64 from = v.offset + walk.offset(s, v);
          for (i64 r = 0; r < high; ++r) {
            read_row(m.ints + from + at * stride, stride, length, in_tile[i] + r * length);
            from = own.next(s, v, from);
          }
          args[first_in + i] = {in_tile[i], L};
          continue;
        }
        S* const base = m.at[v.space] + v.offset;
        if (v.dense) {
          args[first_in + i] = {base + linear, L};
        } else if (one_row && stride == 1) {
          args[first_in + i] = {base + walk.offset(s, v) + at, L};
        } else {
          RowWalk own = walk;
          i64 from = walk.offset(s, v);
          for (i64 r = 0; r < high; ++r) {
            read_row(base + from + at * stride, stride, length, in_tile[i] + r * length);
            from = own.next(s, v, from);
          }
          args[first_in + i] = {in_tile[i], L};
        }
      }
      const bool even = count % L == 0;
      bool direct[MOST_ARGS];
      for (int i = 0; i < s.outputs; ++i) {
        const View& v = out[i];
        S* const base = m.at[v.space] + v.offset;
        direct[i] = true;
        if (v.dense && (even || (v.ends && linear + count == total)))
          args[first_out + i] = {base + linear, L};
        else if (one_row && v.stride[s.dims - 1] == 1 && even)
          args[first_out + i] = {base + walk.offset(s, v) + at, L};
        else
          args[first_out + i] = {out_tile[i], L}, direct[i] = false;
      }
      for (int o = 0; o < s.op_count; ++o) map_op(s.ops[o], args, vectors);
      for (int i = 0; i < s.outputs; ++i) {
        if (direct[i]) continue;
        const View& v = out[i];
        const i64 stride = v.stride[s.dims - 1];
        S* const base = m.at[v.space] + v.offset;
        if (v.dense) {
          write_row(out_tile[i], base + linear, i64(1), count);
          continue;
        }
        RowWalk own = walk;
        i64 to = walk.offset(s, v);
        for (i64 r = 0; r < high; ++r) {
          write_row(out_tile[i] + r * length, base + to + at * stride, stride, length);
          to = own.next(s, v, to);
        }
      }
    }
  }
}
