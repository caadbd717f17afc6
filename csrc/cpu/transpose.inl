// Transposition through registers in blocks of lanes x lanes, by log2(lanes) butterfly stages.

template <class S, int N, int WIDTH>
struct Butterfly {
  // Exchanges the off-diagonal WIDTH x WIDTH blocks of rows r and r + WIDTH.
  static FM_INLINE void run(Vec<S> (&row)[N]) {
    typename VectorOf<S>::mask low, high;
    for (int i = 0; i < N; ++i) {
      const bool second = i & WIDTH;
      low[i] = second ? N + i - WIDTH : i;
      high[i] = second ? N + i : i + WIDTH;
    }
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r)
      if (!(r & WIDTH)) {
        const Vec<S> x = row[r], y = row[r + WIDTH];
#if defined(__clang__)
        for (int i = 0; i < N; ++i) {
          row[r][i] = (i & WIDTH) ? y[i - WIDTH] : x[i];
          row[r + WIDTH][i] = (i & WIDTH) ? y[i] : x[i + WIDTH];
        }
#else
        row[r] = __builtin_shuffle(x, y, low);
        row[r + WIDTH] = __builtin_shuffle(x, y, high);
#endif
      }
    Butterfly<S, N, WIDTH / 2>::run(row);
  }
};
template <class S, int N>
struct Butterfly<S, N, 0> {
  static FM_INLINE void run(Vec<S> (&)[N]) {}
};

template <class S>
void transpose(const Transpose<S>& t) {
  constexpr int L = lanes<S>;
  for (i64 c0 = 0; c0 < t.cols; c0 += L) {
    i64 ld_src;
    const S* src = t.src.column(c0, ld_src);
    const i64 width = t.cols - c0 < L ? t.cols - c0 : L;
    const bool full_width = t.src_padded || width == L;
    for (i64 r0 = 0; r0 < t.rows; r0 += L) {
      i64 ld_dst;
      S* dst = t.dst.column(r0, ld_dst) + c0 * ld_dst;
      const i64 height = t.rows - r0 < L ? t.rows - r0 : L;
      Vec<S> row[L];
      for (int r = 0; r < L; ++r) {
        row[r] = Vec<S>{};
        if (r >= height) continue;
        const S* p = src + (r0 + r) * ld_src;
        if (full_width) {
          row[r] = load(p);
        } else {
          S part[L] = {};
          for (i64 i = 0; i < width; ++i) part[i] = p[i];
          row[r] = load(part);
        }
      }
      Butterfly<S, L, L / 2>::run(row);
      for (int c = 0; c < width; ++c) {
        S* p = dst + c * ld_dst;
        if (t.dst_padded || height == L) {
          store(p, row[c]);
        } else {
          S part[L];
          store(part, row[c]);
          for (i64 i = 0; i < height; ++i) p[i] = part[i];
        }
      }
    }
  }
  // A padded destination is padded to 64 bytes, which may be wider than the vectors above reach.
  if (t.dst_padded)
    for (i64 r = (t.rows + L - 1) / L * L; r < pad<S>(t.rows); ++r) {
      i64 ld_dst;
      S* dst = t.dst.column(r, ld_dst);
      for (i64 c = 0; c < t.cols; ++c) dst[c * ld_dst] = 0;
    }
}
