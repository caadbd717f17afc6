// What batch_norm, layer_norm and group_norm have in common; docs/norms.md has the formulas. A
// group of values that are normalised together is one team's work. Each kind has a struct with
//
//   CHANNELS                    a group is a channel, and has one weight; else every value has its
//                               own
//   COUNT, SIZE                 of groups, and of values in each, as is usual
//   EPSILON                     what is added to the variance
//   count(pass), size(pass)     of groups, and of values in each, in this pass
//   row(g, e), column(g, e)     where value e of group g stands
//   param(g, e)                 which element of weight and bias belongs to it
//   each_use(pass, p, body)     body(g, e) for every value that element p belongs to; not asked of
//                               channels
#pragma once

#include "../pass.h"
#include "../sink.h"
#include "../team.h"

namespace fm::cuda {

// Of a group, kept beside the values: what it is normalised by, and the sums of dy and dy x^ (times
// w if every value has its own). Beside the tangents: the means of rx and rx x^, and of a channel
// the sums that are its R(db) and R(dw).
enum Statistic { MEAN, RSTD, DY, DY_X };
enum TangentStatistic { RX, RX_X, RDY, RDY_X };
constexpr int STATISTICS = 4;

template <int L, Space X>
FM_INLINE S* statistics(const Pass& pass, int group) {
  constexpr Statistics at = LAYERS[L].statistics;
  return memory<X>(pass.workspace, VALUES[LAYERS[L].output].rank,
                   pass.x + pass.examples * at.each + at.fixed + group * STATISTICS);
}
template <int L>
FM_INLINE S* tangent_statistics(const Pass& pass, int group) {
  constexpr Statistics at = LAYERS[L].tangent_statistics;
  return memory<TANGENTS>(pass.workspace, VALUES[LAYERS[L].output].rank,
                          pass.rx + pass.examples * at.each + at.fixed + group * STATISTICS);
}

// CENTRED: the mean of a group is taken away first.
template <class Groups, int L, bool CENTRED = true>
struct Norm {
  static constexpr int IN = LAYERS[L].inputs[0], Y = LAYERS[L].pre >= 0 ? LAYERS[L].pre : LAYERS[L].output;
  static constexpr int W = LAYERS[L].weight, B = LAYERS[L].bias;
  // By running statistics, which stand still: no mean over the group has a derivative.
  static constexpr bool FIXED = LAYERS[L].mean >= 0;
  static constexpr bool CHANNELS = Groups::CHANNELS;
  // A channel's gradients of weight and bias are sums that its input's gradient needs too.
  static constexpr bool PARAMS_IN_INPUT = CHANNELS;
  using Crowd = Team<team_lanes(Groups::COUNT, Groups::SIZE)>;

  template <class Body>
  static FM_INLINE void for_groups(const Pass& pass, const Body& body) {
    FM_UNROLL_BY(1)
    for (int g = Crowd::number(); g < Groups::count(pass); g += Crowd::count()) body(g);
  }

  // One group.
  template <Space X>
  struct Group {
    const Pass& pass;
    int g;
    S mean = 0, rstd = 1, rx = 0, rx_x = 0;

    FM_INLINE Group(const Pass& pass, int g) : pass(pass), g(g) {}
    FM_INLINE void read() {
      const S* const from = statistics<L, X>(pass, g);
      mean = from[MEAN], rstd = from[RSTD];
    }
    FM_INLINE void read_tangent() {
      if constexpr (has_tangent<IN> && !FIXED) {
        const S* const from = tangent_statistics<L>(pass, g);
        rx = from[RX], rx_x = from[RX_X];
      }
    }
    FM_INLINE int size() const { return Groups::size(pass); }
    FM_INLINE int in(int e) const { return Groups::row(g, e) * VALUES[IN].ld + Groups::column(g, e); }
    FM_INLINE int out(int e) const { return Groups::row(g, e) * VALUES[Y].ld + Groups::column(g, e); }
    FM_INLINE S hat(int e) const { return (value<IN, X>(pass)[in(e)] - mean) * rstd; }
    FM_INLINE S moved(int e) const {
      if constexpr (has_tangent<IN>) return cuda::tangent<IN>(pass)[in(e)];
      return S(0);
    }
    FM_INLINE S moved_hat(int e) const {
      if constexpr (has_tangent<IN>) return rstd * (moved(e) - rx - hat(e) * rx_x);
      return S(0);
    }
    FM_INLINE S dy(int e) const { return delta<Y, X>(pass)[out(e)]; }
    FM_INLINE S rdy(int e) const { return tangent_delta<Y>(pass)[out(e)]; }
    FM_INLINE S w(int e) const {
      if constexpr (W >= 0) return theta<W>(pass.workspace, pass.k)[Groups::param(g, e)];
      return S(1);
    }
    // dx from the means of g and g x^.
    FM_INLINE S gradient(int e, const Vec<2>& mean) const {
      return rstd * (w(e) * dy(e) - mean.at[0] - hat(e) * mean.at[1]);
    }
    // Element e's share of parameter P's direction.
    template <int P>
    FM_INLINE S v(const Along& along, S factor, int e) const {
      if constexpr (is_adapted(P)) return factor * along.vector<P>()[Groups::param(g, e)];
      return S(0);
    }
  };

  template <Space X>
  static FM_INLINE void forward(const Pass& pass) {
    for_groups(pass, [&](int g) {
      Group<X> at(pass, g);
      const int size = at.size();
      const S eps = S(Groups::EPSILON);
      if constexpr (FIXED) {
        at.mean = theta<LAYERS[L].mean>(pass.workspace, pass.k)[g];
        at.rstd = S(1) / sqrt_(theta<LAYERS[L].var>(pass.workspace, pass.k)[g] + eps);
      } else {
        if constexpr (CENTRED)
          at.mean =
              Crowd::template sum<1>(size, [&](int e) { return one(value<IN, X>(pass)[at.in(e)]); }).at[0] /
              S(size);
        const auto square = [&](int e) { return one(at.hat(e) * at.hat(e)); };
        at.rstd = S(1) / sqrt_(Crowd::template sum<1>(size, square).at[0] / S(size) + eps);
      }
      if (Crowd::lane(0) == 0) {
        S* const to = statistics<L, X>(pass, g);
        to[MEAN] = at.mean, to[RSTD] = at.rstd;
      }
      Crowd::each(size, [&](int e) {
        S y = at.w(e) * at.hat(e);
        if constexpr (B >= 0) y += theta<B>(pass.workspace, pass.k)[Groups::param(g, e)];
        put_value<L, X>(pass, at.out(e), y);
      });
    });
  }

  // The means of g and g x^, from the sums of dy and dy x^.
  static FM_INLINE Vec<2> means(const Vec<2>& sums, S w, int size) {
    if constexpr (FIXED) return {{S(0), S(0)}};
    const S share = (CHANNELS ? w : S(1)) / S(size);
    return {{CENTRED ? sums.at[0] * share : S(0), sums.at[1] * share}};
  }

  template <Space X, bool INPUT>
  static FM_INLINE int backward_input(const Pass& pass, int turn) {
    for_groups(pass, [&](int g) {
      Group<X> at(pass, g);
      at.read();
      const int size = at.size();
      const Vec<2> sums = Crowd::template sum<2>(size, [&](int e) {
        const S dy = CHANNELS ? at.dy(e) : at.w(e) * at.dy(e);
        return Vec<2>{{dy, dy * at.hat(e)}};
      });
      if (Crowd::lane(0) == 0) {
        S* const to = statistics<L, X>(pass, g);
        to[DY] = sums.at[0], to[DY_X] = sums.at[1];
      }
      if constexpr (wants_delta<IN, INPUT>) {
        const Vec<2> mean = means(sums, at.w(0), size);
        Crowd::each(size, [&](int e) {
          put_delta<IN, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, at.in(e), one(at.gradient(e, mean)));
        });
      }
    });
    return turn;
  }

  template <Space X>
  static FM_INLINE void tangent(const Pass& pass, const Along& along) {
    const S w_factor = factor<W>(along), b_factor = factor<B>(along);
    for_groups(pass, [&](int g) {
      Group<X> at(pass, g);
      at.read();
      const int size = at.size();
      if constexpr (has_tangent<IN> && !FIXED) {
        const Vec<2> sums = Crowd::template sum<2>(
            size, [&](int e) { return Vec<2>{{at.moved(e), at.moved(e) * at.hat(e)}}; });
        at.rx = CENTRED ? sums.at[0] / S(size) : S(0), at.rx_x = sums.at[1] / S(size);
        if (Crowd::lane(0) == 0) {
          S* const to = tangent_statistics<L>(pass, g);
          to[RX] = at.rx, to[RX_X] = at.rx_x;
        }
      }
      Crowd::each(size, [&](int e) {
        const S rw = at.template v<W>(along, w_factor, e), rb = at.template v<B>(along, b_factor, e);
        put_tangent<L, X>(pass, at.out(e), at.w(e) * at.moved_hat(e) + rw * at.hat(e) + rb);
      });
    });
  }

  // Where the input does not move, and no parameter either, no dy is kept, and none matters.
  template <Space X, bool INPUT>
  static FM_INLINE int tangent_backward_input(const Pass& pass, const Along& along, int turn) {
    const S w_factor = factor<W>(along);
    for_groups(pass, [&](int g) {
      Group<X> at(pass, g);
      at.read(), at.read_tangent();
      const int size = at.size();
      const auto dy = [&](int e) { return has_tangent<Y> ? at.dy(e) : S(0); };
      // Rg = w rdy + rw dy; of a channel w and rw follow after the sums
      const auto rg = [&](int e) {
        return at.w(e) * at.rdy(e) + at.template v<W>(along, w_factor, e) * dy(e);
      };
      const Vec<2> sums = Crowd::template sum<2>(size, [&](int e) {
        const S moves = CHANNELS ? at.rdy(e) : rg(e), stands = CHANNELS ? dy(e) : at.w(e) * dy(e);
        return Vec<2>{{moves, moves * at.hat(e) + stands * at.moved_hat(e)}};
      });
      if constexpr (CHANNELS)
        if (Crowd::lane(0) == 0) {
          S* const to = tangent_statistics<L>(pass, g);
          to[RDY] = sums.at[0], to[RDY_X] = sums.at[1];
        }
      if constexpr (wants_delta<IN, INPUT>) {
        Vec<2> moved = means(sums, at.w(0), size), mean = {{S(0), S(0)}};
        if constexpr (has_tangent<IN> || (CHANNELS && has_tangent<Y>)) {
          const S* const kept = statistics<L, X>(pass, g);
          const Vec<2> dy_sums = {{kept[DY], kept[DY_X]}};
          mean = means(dy_sums, at.w(0), size);
          if constexpr (CHANNELS) {
            const Vec<2> more = means(dy_sums, at.template v<W>(along, w_factor, 0), size);
            moved.at[0] += more.at[0], moved.at[1] += more.at[1];
          }
        }
        Crowd::each(size, [&](int e) {
          const S hat = at.hat(e);
          S rdx = rg(e) - moved.at[0] - hat * moved.at[1];
          if constexpr (has_tangent<IN>) rdx -= at.moved_hat(e) * mean.at[1] + at.rx_x * at.gradient(e, mean);
          put_tangent_delta<IN, LAYERS[L].adds[0], LAYERS[L].last[0], X>(pass, at.in(e), one(at.rstd * rdx));
        });
      }
    });
    return turn;
  }

  // The gradients of weight and bias: of a channel what `channel` tells, else the sums of `term`,
  // at element p of both.
  template <class Channel, class Term>
  static FM_INLINE int gradients(const Pass& pass, const Sink& sink, int first, const Channel& channel,
                                 const Term& term) {
    if (!sink.template takes<L>()) return first;
    constexpr int COUNT = PARAMS[W >= 0 ? W : B].numel();
    S w_rate = 0, b_rate = 0;
    if constexpr (W >= 0) w_rate = sink.template one_rate<W>();
    if constexpr (B >= 0) b_rate = sink.template one_rate<B>();
    for (int p = thread_from(first); p < COUNT; p += step_threads()) {
      Vec<2> sums = {{S(0), S(0)}};  // of b, of w
      if constexpr (CHANNELS)
        sums = channel(p);
      else
        Groups::each_use(pass, p, [&](int g, int e) {
          const Vec<2> terms = term(g, e);
          sums.at[0] += terms.at[0], sums.at[1] += terms.at[1];
        });
      if constexpr (B == W) sums.at[1] += sums.at[0];
      if constexpr (B >= 0 && B != W) sink.template put<B, L>(0, p, one(sums.at[0]), b_rate);
      if constexpr (W >= 0) sink.template put<W, L>(0, p, one(sums.at[1]), w_rate);
    }
    return (first + COUNT) % step_threads();
  }

  template <Space X>
  static FM_INLINE int backward_params(const Pass& pass, const Sink& sink, int first) {
    const auto channel = [&](int g) {
      const S* const from = statistics<L, X>(pass, g);
      return Vec<2>{{from[DY], from[DY_X]}};
    };
    return gradients(pass, sink, first, channel, [&](int g, int e) {
      Group<X> at(pass, g);
      at.read();
      return Vec<2>{{at.dy(e), at.dy(e) * at.hat(e)}};
    });
  }

  template <Space X>
  static FM_INLINE int tangent_backward_params(const Pass& pass, const Sink& sink, int first) {
    const auto channel = [&](int g) {
      const S* const from = tangent_statistics<L>(pass, g);
      return Vec<2>{{from[RDY], from[RDY_X]}};
    };
    return gradients(pass, sink, first, channel, [&](int g, int e) {
      Group<X> at(pass, g);
      at.read(), at.read_tangent();
      return Vec<2>{{at.rdy(e), at.rdy(e) * at.hat(e) + at.dy(e) * at.moved_hat(e)}};
    });
  }
};

}  // namespace fm::cuda
