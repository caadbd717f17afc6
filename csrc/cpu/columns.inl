// Passes over the columns of blocks of rows: sums, squares, products and linear combinations.
//
// Sums run over pieces of COLUMN_ROWS rows, each by two alternating accumulators, and over the
// pieces in their order: the same for any number of threads, and short enough for single precision.

constexpr i64 COLUMN_ROWS = 64;

// total(j) = sum over rows of term(r, j) for every vector of columns j.
template <class S, class Term>
FM_INLINE Vec<S> column_total(i64 rows, const Term& term) {
  Vec<S> total{};
  for (i64 start = 0; start < rows; start += COLUMN_ROWS) {
    const i64 stop = start + COLUMN_ROWS < rows ? start + COLUMN_ROWS : rows;
    Vec<S> even{}, odd{};
    i64 r = start;
    for (; r + 1 < stop; r += 2) even += term(r), odd += term(r + 1);
    if (r < stop) even += term(r);
    total += even + odd;
  }
  return total;
}

template <class S>
void column_sums(const ColumnSums<S>& s) {
  for (i64 j = 0; j < s.n; j += lanes<S>) {
    Vec<S> sums =
        column_total<S>(s.rows, [&](i64 r) { return load(s.a + r * s.ld + j); }) * broadcast(s.scale);
    if (s.base) sums += load(s.base + j);
    if (s.also) sums += load(s.also + j);
    store(s.out + j, sums);
  }
}

template <class S>
void column_squares(const ColumnSquares<S>& s) {
  for (i64 j = 0; j < s.n; j += lanes<S>) {
    const Vec<S> center = load(s.center + j);
    const Vec<S> squares = column_total<S>(s.rows, [&](i64 r) {
      const Vec<S> x = load(s.x + r * s.ld + j) - center;
      return x * x;
    });
    store(s.out + j, load(s.out + j) + squares);
  }
}

template <class S>
FM_INLINE Vec<S> masked(Vec<S> x, Vec<S> mask) {
  return mask > 0 ? x : Vec<S>{};
}

template <class S, bool MASK, bool SECOND>
FM_INLINE void products(const ColumnProducts<S>& s) {
  for (i64 j = 0; j < s.n; j += lanes<S>) {
    const Vec<S> center = load(s.center + j);
    Vec<S> sum = load(s.sum + j), sum_x = load(s.sum_x + j), sum_b = SECOND ? load(s.sum_b + j) : Vec<S>{};
    for (i64 start = 0; start < s.rows; start += COLUMN_ROWS) {
      const i64 stop = start + COLUMN_ROWS < s.rows ? start + COLUMN_ROWS : s.rows;
      Vec<S> part{}, part_x{}, part_b{};
      for (i64 r = start; r < stop; ++r) {
        const Vec<S> mask = MASK ? load(s.mask + r * s.ld_mask + j) : Vec<S>{};
        const Vec<S> a = MASK ? masked<S>(load(s.a + r * s.ld + j), mask) : load(s.a + r * s.ld + j);
        part += a, part_x += a * (load(s.x + r * s.ld_x + j) - center);
        if (SECOND) {
          const Vec<S> b = MASK ? masked<S>(load(s.b + r * s.ld + j), mask) : load(s.b + r * s.ld + j);
          part_b += b * load(s.d + r * s.ld_d + j);
        }
      }
      sum += part, sum_x += part_x, sum_b += part_b;
    }
    store(s.sum + j, sum), store(s.sum_x + j, sum_x);
    if (SECOND) store(s.sum_b + j, sum_b);
  }
}

template <class S>
void column_products(const ColumnProducts<S>& s) {
  if (s.mask)
    s.b ? products<S, true, true>(s) : products<S, true, false>(s);
  else
    s.b ? products<S, false, true>(s) : products<S, false, false>(s);
}

template <class S, int TERMS, bool MASK>
FM_INLINE void combination(const ColumnCombination<S>& s) {
  for (i64 j = 0; j < s.n; j += lanes<S>) {
    const Vec<S> center = load(s.center + j), constant = load(s.constant + j);
    Vec<S> coefficients[TERMS];
#pragma GCC unroll 4
    for (int i = 0; i < TERMS; ++i) coefficients[i] = load(s.term[i].coefficients + j);
    for (i64 r = 0; r < s.rows; ++r) {
      const Vec<S> mask = MASK ? load(s.mask + r * s.ld_mask + j) : Vec<S>{};
      Vec<S> sum = constant + coefficients[0] * (load(s.term[0].from + r * s.term[0].ld + j) - center),
             hidden{};
#pragma GCC unroll 4
      for (int i = 1; i < TERMS; ++i) {
        const Vec<S> term = coefficients[i] * load(s.term[i].from + r * s.term[i].ld + j);
        if (MASK && s.term[i].masked)
          hidden += term;
        else
          sum += term;
      }
      if (MASK) sum = s.mask_out ? masked<S>(sum, mask) : sum + masked<S>(hidden, mask);
      if (s.relu) sum = sum < 0 ? Vec<S>{} : sum;
      S* out = s.out + r * s.ld + j;
      store(out, s.add ? load(out) + sum : sum);
    }
  }
}

template <class S>
void column_combination(const ColumnCombination<S>& s) {
  switch (s.terms) {
    case 1:
      return s.mask ? combination<S, 1, true>(s) : combination<S, 1, false>(s);
    case 2:
      return s.mask ? combination<S, 2, true>(s) : combination<S, 2, false>(s);
    case 3:
      return s.mask ? combination<S, 3, true>(s) : combination<S, 3, false>(s);
    default:
      return s.mask ? combination<S, 4, true>(s) : combination<S, 4, false>(s);
  }
}
