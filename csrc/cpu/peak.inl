// Independent multiply-add chains that stay in registers: what this instruction set can do at most.

template <class S>
__attribute__((noinline)) double peak(i64 iterations) {
  using V = Vec<S>;
  constexpr int CHAINS = 12;
  V acc[CHAINS], x = broadcast(S(0.999)), y = broadcast(S(0.001));
  for (int i = 0; i < CHAINS; ++i) acc[i] = broadcast(S(i));
  for (i64 n = 0; n < iterations; ++n)
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) acc[i] = acc[i] * x + y;
  V total{};
  for (int i = 0; i < CHAINS; ++i) total += acc[i];
  volatile S sink = sum<S>(total);
  (void)sink;
  return 2.0 * CHAINS * lanes<S> * double(iterations);
}
