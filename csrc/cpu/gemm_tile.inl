// Register-tiled matrix products: c = epilogue(sum over pairs of a b), see Gemm in cpu/kernels.h.
//
// A tile keeps MR x NV vectors of c in registers and walks down k: NV loads of b, MR broadcasts of
// a, MR * NV multiply-adds. b's panel block (at most K_BLOCK x 64 columns) stays in the first-level
// cache over all row tiles: 40 of 48 KiB where there is AVX-512, else 24 of 32. The order of every
// sum is fixed by the shapes and the instruction set.

constexpr i64 K_BLOCK = FM_REGISTERS == 32 ? 160 : 96;
// A c larger than this comes from a slower cache: it is fetched while its products are summed.
constexpr i64 FAR_BYTES = 64 << 10;

template <class S>
struct Tile {
  int pairs;
  typename Gemm<S>::Operands pair[2];
  S* c;
  i64 ldc;
  const S *base, *also;  // added to scale * products, or null; `also` only beside `base`
  i64 ld_base, ld_also;
  S scale;
  bool far;  // c and base are too large to be in the first-level cache
  // the epilogue of the last block
  const S* bias;
  bool relu;
  const S* mask;
  i64 ld_mask;
};

template <class S, int MR, int NV, bool A_ROW_ONE>
__attribute__((noinline)) void tile(const Tile<S>& t) {
  using V = Vec<S>;
  constexpr int L = lanes<S>;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};

  if (t.far)
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV * L; v += 64 / int(sizeof(S))) {
        __builtin_prefetch(t.c + r * t.ldc + v, 1);
        if (t.base) __builtin_prefetch(t.base + r * t.ld_base + v);
      }

  for (int p = 0; p < t.pairs; ++p) {
    const S* a = t.pair[p].a;
    const S* b = t.pair[p].b;
    const i64 a_row = A_ROW_ONE ? 1 : t.pair[p].a_row, a_k = A_ROW_ONE ? t.pair[p].a_k : 1,
              ldb = t.pair[p].ldb;
    for (i64 k = t.pair[p].k; k > 0; --k) {
      V bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = load(b + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const V av = broadcast(a[r * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] += av * bv[v];
      }
      a += a_k;
      b += ldb;
    }
  }

  const V scale = broadcast(t.scale);
  if (t.base) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = load(t.base + r * t.ld_base + v * L) + acc[r][v] * scale;
  } else if (t.scale != 1) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] *= scale;
  }
  if (t.also)
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += load(t.also + r * t.ld_also + v * L);
  if (t.bias)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const V bias = load(t.bias + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) acc[r][v] += bias;
    }
  if (t.relu)
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = acc[r][v] < 0 ? V{} : acc[r][v];
  if (t.mask)
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = load(t.mask + r * t.ld_mask + v * L) > 0 ? acc[r][v] : V{};
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(t.c + r * t.ldc + v * L, acc[r][v]);
}

template <class S>
using TileFunction = void (*)(const Tile<S>&);

// tiles[NV - 1][MR - 1]; a tile of NV vectors has at most MAX_ROWS[NV - 1] rows, so that it fits in
// the registers.
#define FM_ROW2(S, NV, T) &tile<S, 1, NV, T>, &tile<S, 2, NV, T>
#define FM_ROW4(S, NV, T) FM_ROW2(S, NV, T), &tile<S, 3, NV, T>, &tile<S, 4, NV, T>
#define FM_ROW6(S, NV, T) FM_ROW4(S, NV, T), &tile<S, 5, NV, T>, &tile<S, 6, NV, T>
#define FM_ROW8(S, NV, T) FM_ROW6(S, NV, T), &tile<S, 7, NV, T>, &tile<S, 8, NV, T>
#define FM_ROW12(S, NV, T) \
  FM_ROW8(S, NV, T), &tile<S, 9, NV, T>, &tile<S, 10, NV, T>, &tile<S, 11, NV, T>, &tile<S, 12, NV, T>
#if FM_REGISTERS == 32
constexpr int MAX_VECTORS = 4;
constexpr int MAX_ROWS[MAX_VECTORS] = {12, 12, 8, 6};
template <class S, bool T>
constexpr TileFunction<S> TILES[MAX_VECTORS][12] = {
    {FM_ROW12(S, 1, T)}, {FM_ROW12(S, 2, T)}, {FM_ROW8(S, 3, T)}, {FM_ROW6(S, 4, T)}};
#else
constexpr int MAX_VECTORS = 3;
constexpr int MAX_ROWS[MAX_VECTORS] = {8, 6, 4};
template <class S, bool T>
constexpr TileFunction<S> TILES[MAX_VECTORS][8] = {
    {FM_ROW8(S, 1, T)}, {FM_ROW6(S, 2, T)}, {FM_ROW4(S, 3, T)}};
#endif

// The widest tile for `left` vectors that leaves no lonely vector behind: 5 is 3 + 2, 4 of at most
// 3 is 2 + 2.
FM_INLINE int tile_width(i64 left) {
  if (left <= MAX_VECTORS) return static_cast<int>(left);
  return left == MAX_VECTORS + 1 ? (MAX_VECTORS + 1) / 2 : MAX_VECTORS;
}

// How `m` rows are cut for tiles of `vectors` vectors: into `tiles` tiles, the first `larger` of
// them one row more than `rows`.
struct RowCut {
  i64 tiles, rows, larger;
};
constexpr RowCut divide_rows(i64 m, int vectors) {
  const i64 most = MAX_ROWS[vectors - 1], tiles = (m + most - 1) / most;
  return {tiles, m / tiles, m % tiles};
}
// Divisions cost as much as a small tile: the common cases come from a table.
constexpr i64 TABLED_ROWS = 80;
struct RowCuts {
  RowCut cut[MAX_VECTORS][TABLED_ROWS] = {};
  constexpr RowCuts() {
    for (int v = 0; v < MAX_VECTORS; ++v)
      for (i64 m = 1; m < TABLED_ROWS; ++m) cut[v][m] = divide_rows(m, v + 1);
  }
};
constexpr RowCuts ROW_CUTS;

FM_INLINE RowCut cut_rows(i64 m, int vectors) {
  return m < TABLED_ROWS ? ROW_CUTS.cut[vectors - 1][m] : divide_rows(m, vectors);
}

// Blocks [k0, k0 + k) of the pairs [p, p + pairs), one panel of c: its columns [panel, end), padded
// to [.., padded_end).
template <class S>
FM_INLINE void gemm_block(const Gemm<S>& g, int p, int pairs, i64 panel, i64 end, i64 padded_end, i64 k0,
                          i64 k) {
  constexpr int L = lanes<S>;
  const auto* const tiles = g.pair[p].a_row == 1 && g.pair[p].a_k != 1 ? TILES<S, true> : TILES<S, false>;
  const bool first = p == 0 && k0 == 0, last = p + pairs == g.pairs && k0 + k >= g.depth(p);
  Tile<S> t;
  t.pairs = pairs;
  t.scale = g.scale;
  t.far = g.m * g.n * i64(sizeof(S)) > FAR_BYTES;
  t.relu = last && g.relu;
  t.base = t.also = t.mask = t.bias = nullptr;
  i64 j = panel;
  while (j < end) {
    const int vectors = tile_width((end - j + L - 1) / L);
    const RowCut cut = cut_rows(g.m, vectors);
    for (int i = 0; i < pairs; ++i) {
      const auto& pair = g.pair[p + i];
      auto& to = t.pair[i];
      to.a = pair.a + k0 * pair.a_k;
      to.a_row = pair.a_row;
      to.a_k = pair.a_k;
      to.k = pairs > 1 ? g.depth(i) : k;
      to.b = pair.b.column(j, to.ldb) + k0 * to.ldb;
    }
    t.c = g.c.column(j, t.ldc);
    if (!first)
      t.base = t.c, t.ld_base = t.ldc;
    else if (g.base)
      t.base = g.base.column(j, t.ld_base);
    if (first && g.also) t.also = g.also.column(j, t.ld_also);
    if (last && g.mask) t.mask = g.mask.column(j, t.ld_mask);
    if (last && g.bias) t.bias = g.bias + j;
    for (i64 i = 0; i < cut.tiles; ++i) {
      const i64 rows = cut.rows + (i < cut.larger);
      tiles[vectors - 1][rows - 1](t);
      t.pair[0].a += rows * t.pair[0].a_row;
      if (pairs > 1) t.pair[1].a += rows * t.pair[1].a_row;
      t.c += rows * t.ldc;
      if (t.base) t.base += rows * t.ld_base;
      if (t.also) t.also += rows * t.ld_also;
      if (t.mask) t.mask += rows * t.ld_mask;
    }
    j += vectors * L;
  }
  if (last && j < padded_end) {
    i64 ldc;
    S* c = g.c.column(j, ldc);
    for (i64 r = 0; r < g.m; ++r) zero_columns(c + r * ldc, 0, padded_end - j);
  }
}

template <class S>
void gemm(const Gemm<S>& g) {
  // Whether all of b fits.
  const bool together = g.depth(0) + (g.pairs > 1 ? g.depth(1) : 0) <= K_BLOCK;
  for (i64 panel = 0; panel < g.n; panel += panel_columns<S>) {
    const i64 end = g.n - panel < panel_columns<S> ? g.n : panel + panel_columns<S>,
              padded_end = panel + pad<S>(end - panel);
    if (together) {
      gemm_block(g, 0, g.pairs, panel, end, padded_end, 0, g.depth(0));
      continue;
    }
    for (int p = 0; p < g.pairs; ++p)
      for (i64 k0 = 0, k = g.depth(p); k0 < k; k0 += K_BLOCK)
        gemm_block(g, p, 1, panel, end, padded_end, k0, k - k0 < K_BLOCK ? k - k0 : K_BLOCK);
  }
}

template <class S>
void gemms(const Gemm<S>* calls, i64 count) {
  for (i64 i = 0; i < count; ++i) gemm(calls[i]);
}

// Sums four rows of products at a time, so that their additions overlap.
template <class S, int ROWS>
FM_INLINE void dot_rows(const Dot<S>& d, i64 r) {
  using V = Vec<S>;
  constexpr int L = lanes<S>;
  for (i64 o = 0; o < d.n; ++o) {
    V acc[ROWS] = {};
    for (int p = 0; p < d.pairs; ++p) {
      const i64 a_row = d.pair[p].a_row;
      const S* a = d.pair[p].a + r * a_row;
      const S* b = d.pair[p].b + o * d.pair[p].b_row;
      for (i64 k = 0; k < d.k; k += L) {
        const V bv = load(b + k);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) acc[i] += load(a + i * a_row + k) * bv;
      }
    }
    const S bias = d.bias ? d.bias[o] : S(0);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) d.c[(r + i) * d.ldc + o] = sum<S>(acc[i]) + bias;
  }
}

template <class S>
void dot(const Dot<S>& d) {
  for (i64 r = 0; r < d.m; ++r) zero_columns(d.c + r * d.ldc, 0, d.ldc);
  i64 r = 0;
  for (; r + 4 <= d.m; r += 4) dot_rows<S, 4>(d, r);
  for (; r < d.m; ++r) dot_rows<S, 1>(d, r);
}
