// A team: neighbours in a warp that take one piece of work together.
#pragma once

#include "memory.h"

namespace fm::cuda {

// Lanes of a team where so many pieces of work, of so many elements each, are to keep all threads
// busy.
constexpr int team_lanes(int pieces, int elements) {
  int lanes = 1;
  while (lanes < 32 && 2 * lanes * pieces <= CREW && 2 * lanes <= elements) lanes *= 2;
  return lanes;
}

template <int LANES>
struct Team {
  // Lanes that a thread stands for, threads of a team.
  static constexpr int OWN = smaller(LANES, HELD), THREADS = LANES / OWN;

  static FM_INLINE int number() { return thread() / THREADS; }
  static FM_INLINE int count() { return step_threads() / THREADS; }
  static FM_INLINE int lane(int own) { return OWN > 1 ? own : thread() % LANES; }

  // Calls body(e) for 0 <= e < size, each in one lane.
  template <class Body>
  static FM_INLINE void each(int size, const Body& body) {
    for (int own = 0; own < OWN; ++own)
      for (int e = lane(own); e < size; e += LANES) body(e);
  }
  // The sums of N terms, term(e), over 0 <= e < size: for every lane, in an order that depends on
  // LANES alone.
  template <int N, class Term>
  static FM_INLINE Vec<N> sum(int size, const Term& term) {
    S part[N][OWN];
    for (int own = 0; own < OWN; ++own) {
      FM_UNROLL
      for (int i = 0; i < N; ++i) part[i][own] = 0;
      for (int e = lane(own); e < size; e += LANES) {
        const Vec<N> terms = term(e);
        FM_UNROLL
        for (int i = 0; i < N; ++i) part[i][own] += terms.at[i];
      }
    }
    Vec<N> total;
    FM_UNROLL
    for (int i = 0; i < N; ++i) {
      add_lanes<LANES>(part[i]);
      total.at[i] = part[i][0];
    }
    return total;
  }
};

}  // namespace fm::cuda
