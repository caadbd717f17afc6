// Matrix products of small matrices: rows of vectors, or a task in every lane.

template <class S>
struct ProductTile {
  i64 depth;
  const S *a, *b;
  i64 a_m, a_k, b_k, b_n;  // b_n: with a task in every lane
  S* c;
  i64 c_m, c_n;
  bool accumulate;
  i64 left;  // elements of the last vector of a row
};

// MR rows of NV vectors.
template <class S, int MR, int NV>
__attribute__((noinline)) void row_tile(const ProductTile<S>& t) {
  constexpr int L = lanes<S>;
  Vec<S> acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Vec<S>{};
  const S *a = t.a, *b = t.b;
  for (i64 k = t.depth; k > 0; --k) {
    Vec<S> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = load(b + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Vec<S> av = broadcast(a[r * t.a_m]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += av * bv[v];
    }
    a += t.a_k, b += t.b_k;
  }
  if (t.accumulate)
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += load(t.c + r * t.c_m + v * L);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    S* const c = t.c + r * t.c_m;
#pragma GCC unroll 4
    for (int v = 0; v < NV - 1; ++v) store(c + v * L, acc[r][v]);
    if (t.left == L) {
      store(c + (NV - 1) * L, acc[r][NV - 1]);
    } else {
      const Vec<S> last = acc[r][NV - 1];
      for (i64 i = 0; i < t.left; ++i) c[(NV - 1) * L + i] = last[i];
    }
  }
}

// MR x NR elements, each a vector over tasks.
template <class S, int MR, int NR>
__attribute__((noinline)) void lane_tile(const ProductTile<S>& t) {
  Vec<S> acc[MR][NR];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) acc[r][n] = Vec<S>{};
  const S *a = t.a, *b = t.b;
  for (i64 k = t.depth; k > 0; --k) {
    Vec<S> bv[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) bv[n] = load(b + n * t.b_n);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Vec<S> av = load(a + r * t.a_m);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) acc[r][n] += av * bv[n];
    }
    a += t.a_k, b += t.b_k;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      S* const c = t.c + r * t.c_m + n * t.c_n;
      store(c, t.accumulate ? acc[r][n] + load(c) : acc[r][n]);
    }
}

template <class S>
using ProductFunction = void (*)(const ProductTile<S>&);

// As many accumulators as registers allow.
constexpr int ROW_BUDGET = FM_REGISTERS == 32 ? 24 : 12;
constexpr int MOST_ROWS = 12, MOST_VECTORS = 4;
constexpr int LANE_BUDGET = FM_REGISTERS == 32 ? 25 : 12, LANE_SIDE = FM_REGISTERS == 32 ? 5 : 3;
constexpr int MOST_LANE_COLUMNS = 5;

template <class S, int MR, int NV>
constexpr ProductFunction<S> row_tile_or_none() {
  if constexpr (MR * NV <= ROW_BUDGET)
    return &row_tile<S, MR, NV>;
  else
    return nullptr;
}
#define FM_ROWS(NV)                                                                            \
  {row_tile_or_none<S, 1, NV>(),  row_tile_or_none<S, 2, NV>(),  row_tile_or_none<S, 3, NV>(), \
   row_tile_or_none<S, 4, NV>(),  row_tile_or_none<S, 5, NV>(),  row_tile_or_none<S, 6, NV>(), \
   row_tile_or_none<S, 7, NV>(),  row_tile_or_none<S, 8, NV>(),  row_tile_or_none<S, 9, NV>(), \
   row_tile_or_none<S, 10, NV>(), row_tile_or_none<S, 11, NV>(), row_tile_or_none<S, 12, NV>()}
template <class S>
constexpr ProductFunction<S> ROW_TILES[MOST_VECTORS][MOST_ROWS] = {FM_ROWS(1), FM_ROWS(2), FM_ROWS(3),
                                                                   FM_ROWS(4)};
#undef FM_ROWS

template <class S, int MR, int NR>
constexpr ProductFunction<S> lane_tile_or_none() {
  if constexpr (MR * NR <= LANE_BUDGET)
    return &lane_tile<S, MR, NR>;
  else
    return nullptr;
}
#define FM_LANES(MR)                                                                            \
  {lane_tile_or_none<S, MR, 1>(), lane_tile_or_none<S, MR, 2>(), lane_tile_or_none<S, MR, 3>(), \
   lane_tile_or_none<S, MR, 4>(), lane_tile_or_none<S, MR, 5>()}
template <class S>
constexpr ProductFunction<S> LANE_TILES[MOST_ROWS][MOST_LANE_COLUMNS] = {
    FM_LANES(1), FM_LANES(2), FM_LANES(3), FM_LANES(4),  FM_LANES(5),  FM_LANES(6),
    FM_LANES(7), FM_LANES(8), FM_LANES(9), FM_LANES(10), FM_LANES(11), FM_LANES(12)};
#undef FM_LANES

// How `n` is cut into parts of `most` at most, all of about one size.
FM_INLINE i64 even_part(i64 n, i64 most) {
  const i64 parts = (n + most - 1) / most;
  return (n + parts - 1) / parts;
}

template <class S>
FM_INLINE void product_in_rows(const machine::Step& s, i64 m, i64 n, ProductTile<S> t) {
  constexpr int L = lanes<S>;
  const S *const a = t.a, *const b = t.b;
  S* const c = t.c;
  const i64 vectors = (n + L - 1) / L;
  i64 v = 0;
  while (v < vectors) {
    const i64 most = vectors - v;
    const int nv = int(most == 5 ? 3 : most < MOST_VECTORS ? most : FM_REGISTERS == 32 ? 4 : 2);
    const bool last = v + nv == vectors;
    t.left = last ? n - (vectors - 1) * L : L;
    const i64 budget = ROW_BUDGET / nv < MOST_ROWS ? ROW_BUDGET / nv : MOST_ROWS;
    const i64 rows = even_part(m, budget);
    t.b = b + v * L;
    for (i64 r = 0; r < m; r += rows) {
      const i64 high = m - r < rows ? m - r : rows;
      t.a = a + r * t.a_m, t.c = c + r * t.c_m + v * L;
      ROW_TILES<S>[nv - 1][high - 1](t);
    }
    v += nv;
  }
  (void)s;
}

template <class S>
FM_INLINE void product_by_elements(i64 m, i64 n, const ProductTile<S>& t) {
  constexpr int L = lanes<S>;
  const bool vectors = t.a_k == 1 && t.b_k == 1;
  for (i64 i = 0; i < m; ++i)
    for (i64 j = 0; j < n; ++j) {
      const S *a = t.a + i * t.a_m, *b = t.b + j * t.b_n;
      S total = 0;
      i64 k = 0;
      if (vectors && t.depth >= L) {
        Vec<S> acc = {};
        for (; k + L <= t.depth; k += L) acc += load(a + k) * load(b + k);
        total = sum<S>(acc);
      }
      for (; k < t.depth; ++k) total += a[k * t.a_k] * b[k * t.b_k];
      S* const c = t.c + i * t.c_m + j * t.c_n;
      *c = t.accumulate ? *c + total : total;
    }
}

template <class S>
FM_INLINE void product_in_lanes(i64 m, i64 n, ProductTile<S> t) {
  const S *const a = t.a, *const b = t.b;
  S* const c = t.c;
  // few rows: all of them, so that the right factor is read once
  const i64 rows = m <= MOST_ROWS && n > 1 && LANE_BUDGET / m >= 2 ? m : even_part(m, LANE_SIDE);
  const i64 fit = LANE_BUDGET / rows < MOST_LANE_COLUMNS ? LANE_BUDGET / rows : MOST_LANE_COLUMNS;
  const i64 cols = even_part(n, fit);
  for (i64 j = 0; j < n; j += cols) {
    const i64 wide = n - j < cols ? n - j : cols;
    t.b = b + j * t.b_n;
    for (i64 i = 0; i < m; i += rows) {
      const i64 high = m - i < rows ? m - i : rows;
      t.a = a + i * t.a_m, t.c = c + i * t.c_m + j * t.c_n;
      LANE_TILES<S>[high - 1][wide - 1](t);
    }
  }
}

template <class S, bool LANES>
void run_product(const machine::Step& s, machine::Memory<S>& mem) {
  using namespace machine;
  const View &out = s.views[0], &a = s.views[1], &b = s.views[2];
  const int d = s.dims - 3;
  const i64 m = s.n[d], n = s.n[d + 1];
  ProductTile<S> t;
  t.depth = s.n[d + 2];
  t.a_m = a.stride[d], t.a_k = a.stride[d + 2];
  t.b_n = b.stride[d + 1], t.b_k = b.stride[d + 2];
  t.c_m = out.stride[d], t.c_n = out.stride[d + 1];
  t.accumulate = s.accumulate;
  t.left = 0;
  i64 outer = 1;
  for (int i = 0; i < d; ++i) outer *= s.n[i];
  const bool rows = t.b_n == 1 && t.c_n == 1 && n > 1;
  for (i64 q = 0; q < outer; ++q) {
    i64 at_out = out.offset, at_a = a.offset, at_b = b.offset, rest = q;
    for (int i = d - 1; i >= 0; --i) {
      const i64 at = rest % s.n[i];
      rest /= s.n[i];
      at_out += at * out.stride[i], at_a += at * a.stride[i], at_b += at * b.stride[i];
    }
    t.a = mem.at[a.space] + at_a, t.b = mem.at[b.space] + at_b, t.c = mem.at[out.space] + at_out;
    if constexpr (LANES)
      product_in_lanes(m, n, t);
    else if (rows)
      product_in_rows(s, m, n, t);
    else
      product_by_elements(m, n, t);
  }
}
