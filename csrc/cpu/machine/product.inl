// Matrix products of small matrices: rows of vectors, or a task in every lane.

template <class S>
struct Factors {
  i64 depth;
  const S *a, *b;
  i64 a_m, a_k, b_k, b_n;
};

// c = after(scale * (a b + more + partial) + start): what is null or empty is left out.
template <class S>
struct ProductTile {
  Factors<S> factors[2];
  int pairs;
  S* c;
  i64 c_m, c_n;
  const S *partial, *start, *gate;  // partial: in the strides of c
  i64 start_m, start_n, gate_m, gate_n;
  S scale;
  bool scaled, relu;
};

template <class S>
FM_INLINE Vec<S> zero_below(Vec<S> gate, Vec<S> x) {
  return gate <= Vec<S>{} ? Vec<S>{} : x;
}
template <class S>
FM_INLINE Vec<S> no_negatives(Vec<S> x) {
  return x < Vec<S>{} ? Vec<S>{} : x;
}
template <class S>
FM_INLINE Vec<S> load_row(const S* p, i64 stride) {
  if (stride == 1) return load(p);
  if (stride == 0) return broadcast(*p);
  Vec<S> x;
  for (int i = 0; i < lanes<S>; ++i) x[i] = p[i * stride];
  return x;
}
template <class S>
FM_INLINE Vec<S> load_row(const S* p, i64 stride, i64 left) {
  if (stride == 1 || stride == 0 || left == lanes<S>) return load_row(p, stride);
  Vec<S> x = {};
  for (i64 i = 0; i < left; ++i) x[i] = p[i * stride];
  return x;
}

// MR rows of NV vectors, at row i and column j; `left`: elements of the last vector of a row.
template <class S, int MR, int NV>
__attribute__((noinline)) void row_tile(const ProductTile<S>& t, i64 i, i64 j, i64 left) {
  constexpr int L = lanes<S>;
  S* const to = t.c + i * t.c_m + j;
  Vec<S> acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Vec<S>{};
  for (int p = 0; p < t.pairs; ++p) {
    const Factors<S>& f = t.factors[p];
    const S *a = f.a + i * f.a_m, *b = f.b + j;
    for (i64 k = f.depth; k > 0; --k) {
      Vec<S> bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = load(b + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const Vec<S> av = broadcast(a[r * f.a_m]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] += av * bv[v];
      }
      a += f.a_k, b += f.b_k;
    }
  }
#define FM_EACH \
  _Pragma("GCC unroll 16") for (int r = 0; r < MR; ++r) _Pragma("GCC unroll 4") for (int v = 0; v < NV; ++v)
  if (t.partial) {
    const S* const from = t.partial + i * t.c_m + j;
    FM_EACH acc[r][v] += load(from + r * t.c_m + v * L);
  }
  if (t.scaled) {
    const Vec<S> scale = broadcast(t.scale);
    FM_EACH acc[r][v] *= scale;
  }
  if (t.start) {
    const S* const from = t.start + i * t.start_m + j * t.start_n;
    FM_EACH acc[r][v] += load_row(from + r * t.start_m + v * L * t.start_n, t.start_n, v < NV - 1 ? L : left);
  }
  if (t.gate) {
    const S* const from = t.gate + i * t.gate_m + j * t.gate_n;
    FM_EACH acc[r][v] = zero_below<S>(
        load_row(from + r * t.gate_m + v * L * t.gate_n, t.gate_n, v < NV - 1 ? L : left), acc[r][v]);
  }
  if (t.relu) FM_EACH acc[r][v] = no_negatives<S>(acc[r][v]);
#undef FM_EACH
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    S* const c = to + r * t.c_m;
#pragma GCC unroll 4
    for (int v = 0; v < NV - 1; ++v) store(c + v * L, acc[r][v]);
    if (left == L) {
      store(c + (NV - 1) * L, acc[r][NV - 1]);
    } else {
      const Vec<S> last = acc[r][NV - 1];
      for (i64 e = 0; e < left; ++e) c[(NV - 1) * L + e] = last[e];
    }
  }
}

// MR x NR elements from row i and column j on, each a vector over tasks.
template <class S, int MR, int NR>
__attribute__((noinline)) void lane_tile(const ProductTile<S>& t, i64 i, i64 j) {
  Vec<S> acc[MR][NR];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) acc[r][n] = Vec<S>{};
  for (int p = 0; p < t.pairs; ++p) {
    const Factors<S>& f = t.factors[p];
    const S *a = f.a + i * f.a_m, *b = f.b + j * f.b_n;
    for (i64 k = f.depth; k > 0; --k) {
      Vec<S> bv[NR];
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) bv[n] = load(b + n * f.b_n);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const Vec<S> av = load(a + r * f.a_m);
#pragma GCC unroll 8
        for (int n = 0; n < NR; ++n) acc[r][n] += av * bv[n];
      }
      a += f.a_k, b += f.b_k;
    }
  }
#define FM_EACH \
  _Pragma("GCC unroll 16") for (int r = 0; r < MR; ++r) _Pragma("GCC unroll 8") for (int n = 0; n < NR; ++n)
  if (t.partial) {
    const S* const from = t.partial + i * t.c_m + j * t.c_n;
    FM_EACH acc[r][n] += load(from + r * t.c_m + n * t.c_n);
  }
  if (t.scaled) {
    const Vec<S> scale = broadcast(t.scale);
    FM_EACH acc[r][n] *= scale;
  }
  if (t.start) {
    const S* const from = t.start + i * t.start_m + j * t.start_n;
    FM_EACH acc[r][n] += load(from + r * t.start_m + n * t.start_n);
  }
  if (t.gate) {
    const S* const from = t.gate + i * t.gate_m + j * t.gate_n;
    FM_EACH acc[r][n] = zero_below<S>(load(from + r * t.gate_m + n * t.gate_n), acc[r][n]);
  }
  if (t.relu) FM_EACH acc[r][n] = no_negatives<S>(acc[r][n]);
  S* const to = t.c + i * t.c_m + j * t.c_n;
  FM_EACH store(to + r * t.c_m + n * t.c_n, acc[r][n]);
#undef FM_EACH
}

template <class S>
using RowTile = void (*)(const ProductTile<S>&, i64 i, i64 j, i64 left);
template <class S>
using LaneTile = void (*)(const ProductTile<S>&, i64 i, i64 j);

// As many accumulators as registers allow.
constexpr int ROW_BUDGET = FM_REGISTERS == 32 ? 24 : 12;
constexpr int MOST_ROWS = 12, MOST_VECTORS = 4;
constexpr int LANE_BUDGET = FM_REGISTERS == 32 ? 25 : 12, LANE_SIDE = FM_REGISTERS == 32 ? 5 : 3;
constexpr int MOST_LANE_COLUMNS = 5;

template <class S, int MR, int NV>
constexpr RowTile<S> row_tile_or_none() {
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
constexpr RowTile<S> ROW_TILES[MOST_VECTORS][MOST_ROWS] = {FM_ROWS(1), FM_ROWS(2), FM_ROWS(3), FM_ROWS(4)};
#undef FM_ROWS

template <class S, int MR, int NR>
constexpr LaneTile<S> lane_tile_or_none() {
  if constexpr (MR * NR <= LANE_BUDGET)
    return &lane_tile<S, MR, NR>;
  else
    return nullptr;
}
#define FM_LANES(MR)                                                                            \
  {lane_tile_or_none<S, MR, 1>(), lane_tile_or_none<S, MR, 2>(), lane_tile_or_none<S, MR, 3>(), \
   lane_tile_or_none<S, MR, 4>(), lane_tile_or_none<S, MR, 5>()}
template <class S>
constexpr LaneTile<S> LANE_TILES[MOST_ROWS][MOST_LANE_COLUMNS] = {
    FM_LANES(1), FM_LANES(2), FM_LANES(3), FM_LANES(4),  FM_LANES(5),  FM_LANES(6),
    FM_LANES(7), FM_LANES(8), FM_LANES(9), FM_LANES(10), FM_LANES(11), FM_LANES(12)};
#undef FM_LANES

// How `n` is cut into parts of `most` at most, all of about one size.
FM_INLINE i64 even_part(i64 n, i64 most) {
  const i64 parts = (n + most - 1) / most;
  return (n + parts - 1) / parts;
}

template <class S>
FM_INLINE void product_in_rows(i64 m, i64 n, const ProductTile<S>& t) {
  constexpr int L = lanes<S>;
  const i64 vectors = (n + L - 1) / L;
  i64 v = 0;
  while (v < vectors) {
    const i64 most = vectors - v;
    const int nv = int(most == 5 ? 3 : most < MOST_VECTORS ? most : FM_REGISTERS == 32 ? 4 : 2);
    const bool last = v + nv == vectors;
    const i64 budget = ROW_BUDGET / nv < MOST_ROWS ? ROW_BUDGET / nv : MOST_ROWS;
    const i64 rows = even_part(m, budget);
    for (i64 r = 0; r < m; r += rows) {
      const i64 high = m - r < rows ? m - r : rows;
      ROW_TILES<S>[nv - 1][high - 1](t, r, v* L, last ? n - (vectors - 1)* L : L);
    }
    v += nv;
  }
}

template <class S>
FM_INLINE S element_of(const Factors<S>& f, i64 i, i64 j) {
  constexpr int L = lanes<S>;
  const S *a = f.a + i * f.a_m, *b = f.b + j * f.b_n;
  S total = 0;
  i64 k = 0;
  if (f.a_k == 1 && f.b_k == 1 && f.depth >= L) {
    Vec<S> acc = {};
    for (; k + L <= f.depth; k += L) acc += load(a + k) * load(b + k);
    total = sum<S>(acc);
  }
  for (; k < f.depth; ++k) total += a[k * f.a_k] * b[k * f.b_k];
  return total;
}

template <class S>
FM_INLINE void product_by_elements(i64 m, i64 n, const ProductTile<S>& t) {
  for (i64 i = 0; i < m; ++i)
    for (i64 j = 0; j < n; ++j) {
      const i64 at = i * t.c_m + j * t.c_n;
      S x = element_of(t.factors[0], i, j);
      if (t.pairs > 1) x += element_of(t.factors[1], i, j);
      if (t.partial) x += t.partial[at];
      if (t.scaled) x *= t.scale;
      if (t.start) x += t.start[i * t.start_m + j * t.start_n];
      if (t.gate && t.gate[i * t.gate_m + j * t.gate_n] <= 0) x = 0;
      if (t.relu && x < 0) x = 0;
      t.c[at] = x;
    }
}

template <class S>
FM_INLINE void product_in_lanes(i64 m, i64 n, const ProductTile<S>& t) {
  const i64 side = n >= LANE_SIDE ? LANE_SIDE : LANE_BUDGET / n < MOST_ROWS ? LANE_BUDGET / n : MOST_ROWS;
  const i64 rows = even_part(m, side);
  const i64 fit = LANE_BUDGET / rows < MOST_LANE_COLUMNS ? LANE_BUDGET / rows : MOST_LANE_COLUMNS;
  const i64 cols = even_part(n, fit);
  const auto tile = [&](i64 i, i64 j) {
    const i64 high = m - i < rows ? m - i : rows, wide = n - j < cols ? n - j : cols;
    LANE_TILES<S>[high - 1][wide - 1](t, i, j);
  };
  if (n <= m)  // the smaller factor stays in the cache
    for (i64 i = 0; i < m; i += rows)
      for (i64 j = 0; j < n; j += cols) tile(i, j);
  else
    for (i64 j = 0; j < n; j += cols)
      for (i64 i = 0; i < m; i += rows) tile(i, j);
}
// Two products in one pass where a panel of both left factors stays in the first-level cache, else
// one after the other.
constexpr i64 PANEL_BYTES = 16 << 10;
template <class S>
FM_INLINE void pair_in_lanes(i64 m, i64 n, ProductTile<S> t, S* c) {
  const i64 depth = t.factors[0].depth + t.factors[1].depth;
  if (even_part(m, n >= LANE_SIDE ? LANE_SIDE : MOST_ROWS) * depth * i64(sizeof(Vec<S>)) <= PANEL_BYTES) {
    product_in_lanes(m, n, t);
    return;
  }
  ProductTile<S> first = t;
  first.pairs = 1, first.c = c, first.scaled = first.relu = false;
  first.start = first.gate = nullptr;
  product_in_lanes(m, n, first);
  t.factors[0] = t.factors[1], t.pairs = 1, t.partial = c;
  product_in_lanes(m, n, t);
}

// The same product with left and right exchanged.
template <class S>
FM_INLINE ProductTile<S> turned(ProductTile<S> t) {
  const auto swap = [](auto& x, auto& y) {
    const auto z = x;
    x = y, y = z;
  };
  for (auto& f : t.factors) swap(f.a, f.b), swap(f.a_m, f.b_n), swap(f.a_k, f.b_k);
  swap(t.c_m, t.c_n), swap(t.start_m, t.start_n), swap(t.gate_m, t.gate_n);
  return t;
}

template <class S, bool LANES>
void run_product(const machine::Step& s, machine::Memory<S>& mem) {
  using namespace machine;
  const View* const views = s.views;
  const View& out = views[0];
  const int d = s.dims - 3;
  const i64 m = s.n[d], n = s.n[d + 1];
  ProductTile<S> t{};
  t.pairs = s.more ? 2 : 1;
  bool rows = out.stride[d + 1] == 1 && n > 1;
  for (int p = 0; p < t.pairs; ++p) {
    const View &a = views[1 + 2 * p], &b = views[2 + 2 * p];
    t.factors[p] = {p ? s.more : s.n[d + 2], nullptr,         nullptr,        a.stride[d],
                    a.stride[d + 2],         b.stride[d + 2], b.stride[d + 1]};
    rows = rows && b.stride[d + 1] == 1;
  }
  t.c_m = out.stride[d], t.c_n = out.stride[d + 1];
  t.start_m = views[5].stride[d], t.start_n = views[5].stride[d + 1];
  t.gate_m = views[6].stride[d], t.gate_n = views[6].stride[d + 1];
  t.relu = s.relu;
  const bool updates = s.updates >= 0 && mem.update_to;
  if (updates) {
    t.scaled = true, t.scale = mem.update_scale[s.updates];
    t.start_m = t.c_m, t.start_n = t.c_n;
  }
  i64 outer = 1;
  for (int i = 0; i < d; ++i) outer *= s.n[i];
  for (i64 q = 0; q < outer; ++q) {
    i64 at[7], rest = q;
    for (int v = 0; v < 7; ++v) at[v] = views[v].offset;
    for (int i = d - 1; i >= 0; --i) {
      const i64 index = rest % s.n[i];
      rest /= s.n[i];
      for (int v = 0; v < 7; ++v) at[v] += index * views[v].stride[i];
    }
    for (int p = 0; p < t.pairs; ++p) {
      t.factors[p].a = mem.at[views[1 + 2 * p].space] + at[1 + 2 * p];
      t.factors[p].b = mem.at[views[2 + 2 * p].space] + at[2 + 2 * p];
    }
    S* const c = mem.at[out.space] + at[0];
    t.partial = s.accumulate ? c : nullptr;
    t.c = updates ? mem.update_to + at[0] : c;
    t.start = updates ? mem.update_from + at[0] : s.starts ? mem.at[views[5].space] + at[5] : nullptr;
    t.gate = s.gates ? mem.at[views[6].space] + at[6] : nullptr;
    if constexpr (LANES) {
      const bool turn = m < n && m < LANE_SIDE;  // few rows: tiles are high, not wide
      const ProductTile<S> tile = turn ? turned(t) : t;
      const i64 high = turn ? n : m, wide = turn ? m : n;
      if (t.pairs > 1)
        pair_in_lanes(high, wide, tile, c);
      else
        product_in_lanes(high, wide, tile);
    } else if (rows)
      product_in_rows(m, n, t);
    else
      product_by_elements(m, n, t);
  }
}
