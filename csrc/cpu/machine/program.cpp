#include "program.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fm::machine {
namespace {

// Numbers beyond this are no sizes or strides of any memory; products of two stay exact.
constexpr i64 MOST = i64(1) << 40;
constexpr i64 TILE_BYTES = 24 << 10;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("Machine: " + what); }

class Decoder {
 public:
  Decoder(const Code& code, i64 lanes, i64 element) : code_(code), lanes_(lanes), element_(element) {
    for (i64 size : code.sizes)
      if (size < 0 || size > MOST / 64) refuse("a space of a size that cannot be");
  }

  Program read() {
    program_.sizes = code_.sizes;
    for (double x : code_.numbers) add_splat(x);
    i64 done = 0;
    for (i64 count : code_.stage_counts) {
      if (count < 0 || count > MOST) refuse("a stage of a length that cannot be");
      for (i64 i = 0; i < count; ++i) step();
      done = i64(program_.steps.size());
      program_.stage_ends.push_back(done);
    }
    if (at_ != code_.words.size()) refuse("words after the last instruction");
    for (size_t i = 0; i < program_.steps.size(); ++i) {
      Step& s = program_.steps[i];
      s.views = program_.views.data() + first_view_[i];
      s.ops = program_.ops.data() + first_op_[i];
      s.splats = program_.splats.data() + 64 * first_number_[i];
    }
    return std::move(program_);
  }

 private:
  i64 word() {
    if (at_ >= code_.words.size()) refuse("an instruction ends too early");
    return code_.words[at_++];
  }
  i64 word(i64 least, i64 most, const char* what) {
    const i64 w = word();
    if (w < least || w > most) refuse(std::string(what) + " is " + std::to_string(w));
    return w;
  }
  void add_splat(double x) {
    char bytes[64];
    for (i64 i = 0; i < 64 / element_; ++i) {
      if (element_ == 4) {
        const float f = float(x);
        std::memcpy(bytes + 4 * i, &f, 4);
      } else {
        std::memcpy(bytes + 8 * i, &x, 8);
      }
    }
    program_.splats.insert(program_.splats.end(), bytes, bytes + 64);
  }

  void step() {
    Step s{};
    s.updates = -1;
    s.kind = StepKind(word(0, 4, "an instruction"));
    first_view_.push_back(program_.views.size());
    first_op_.push_back(program_.ops.size());
    first_number_.push_back(0);
    s.dims = int(word(0, MOST_DIMS - 1, "the number of dimensions"));
    for (int d = 0; d < s.dims; ++d) s.n[d] = word(1, MOST, "a size");
    switch (s.kind) {
      case StepKind::map:
        map(s);
        break;
      case StepKind::reduce:
        reduce(s);
        break;
      case StepKind::product:
        product(s);
        break;
      default:
        gather(s);
    }
    program_.steps.push_back(s);
  }

  View view(const Step& s, bool writes) {
    View v{};
    v.space = int(word(0, SPACES - 1, "a space"));
    v.offset = word(-MOST, MOST, "an offset");
    v.ends = writes && word(0, 1, "a flag");
    for (int d = 0; d < s.dims; ++d) v.stride[d] = word(-MOST, MOST, "a stride");
    const Space space = Space(v.space);
    const bool result =
        space == Space::grad || space == Space::other || space == Space::output || space == Space::curvature;
    if (writes && !result && space != Space::work && space != Space::kept && space != Space::once)
      refuse("an instruction writes where it must not");
    return v;
  }
  // Inside of its space, also when it is moved on by `moved` elements.
  void check(const Step& s, const View& v, i64 moved = 0) const {
    __int128 low = v.offset, high = v.offset;
    for (int d = 0; d < s.dims; ++d) {
      const __int128 reach = __int128(s.n[d] - 1) * v.stride[d];
      (reach < 0 ? low : high) += reach;
    }
    (moved < 0 ? low : high) += moved;
    if (low < 0 || high >= program_.sizes[v.space]) refuse("a view reaches out of its space");
  }

  // A task in every lane: all addresses are vectors apart, and there is one dimension more.
  void widen(Step& s, const std::vector<View*>& views, int at, bool lane_dim) const {
    if (lanes_ == 1) return;
    for (View* v : views) {
      v->offset *= lanes_;
      for (int d = 0; d < s.dims; ++d) v->stride[d] *= lanes_;
    }
    if (!lane_dim) return;
    for (int d = s.dims; d > at; --d) {
      s.n[d] = s.n[d - 1], s.steps[d] = s.steps[d - 1];
      for (View* v : views) v->stride[d] = v->stride[d - 1];
    }
    s.n[at] = lanes_, s.steps[at] = 0;
    for (View* v : views) v->stride[at] = 1;
    ++s.dims;
  }
  // Dimensions [from, to) that are one walk for all views become one; returns the new `to`.
  static int collapse(Step& s, const std::vector<View*>& views, int from, int to) {
    const auto drop = [&](int d) {
      for (int e = d; e + 1 < s.dims; ++e) {
        s.n[e] = s.n[e + 1], s.steps[e] = s.steps[e + 1];
        for (View* v : views) v->stride[e] = v->stride[e + 1];
      }
      --s.dims, --to;
    };
    for (int d = to - 1; d >= from; --d)
      if (s.n[d] == 1) drop(d);
    for (int d = to - 2; d >= from; --d) {
      bool joined = s.steps[d] == s.n[d + 1] * s.steps[d + 1];
      for (View* v : views) joined = joined && v->stride[d] == s.n[d + 1] * v->stride[d + 1];
      if (!joined) continue;
      s.n[d + 1] *= s.n[d];
      drop(d);
    }
    return to;
  }
  static void need_a_dimension(Step& s) {
    if (s.dims == 0) s.dims = 1, s.n[0] = 1;
  }
  void mark(const Step& s, View& v) const {
    i64 want = 1;
    v.dense = true, v.uniform = true;
    for (int d = s.dims - 1; d >= 0; --d) {
      v.dense = v.dense && (s.n[d] == 1 || v.stride[d] == want);
      want *= s.n[d];
      if (s.n[d] == 1) continue;
      const bool lane = lanes_ > 1 && d == s.dims - 1 && s.n[d] == lanes_ && v.stride[d] == 1;
      v.uniform = v.uniform && (v.stride[d] == 0 || lane);
    }
    if (v.space == int(Space::ints) && lanes_ > 1) v.uniform = false;
  }

  void map(Step& s) {
    s.inputs = int(word(0, MOST_ARGS / 2, "the number of inputs"));
    std::vector<View> views;
    for (int i = 0; i < s.inputs; ++i) views.push_back(view(s, false));
    s.outputs = int(word(1, MOST_ARGS / 4, "the number of outputs"));
    for (int i = 0; i < s.outputs; ++i) {
      views.push_back(view(s, true));
      if (views.back().space == int(Space::ints)) refuse("a map writes integers");
    }
    s.temps = int(word(0, MOST_ARGS / 4, "the number of temporaries"));
    const i64 known = i64(code_.numbers.size()), first = word(0, known, "a number");
    s.numbers = int(word(0, std::min<i64>(known - first, MOST_ARGS / 4), "the number of numbers"));
    first_number_.back() = size_t(first);
    s.op_count = int(word(1, 1 << 20, "the number of functions"));
    const int args = s.temps + s.inputs + s.numbers + s.outputs;
    if (args > MOST_ARGS) refuse("a map has too many arguments");
    for (int i = 0; i < s.op_count; ++i) {
      MicroOp o;
      o.op = int(word(0, int(MapFunction::atan2), "a function"));
      o.to = int(word(0, args - 1, "a destination"));
      const bool temporary = o.to < s.temps, out = o.to >= args - s.outputs;
      if (!temporary && !out) refuse("a function writes to an input");
      o.a = int(word(0, args - 1, "an argument"));
      o.b = int(word(0, args - 1, "an argument"));
      o.c = int(word(0, args - 1, "an argument"));
      program_.ops.push_back(o);
    }
    for (const View& v : views) check(s, v);
    widen_and_collapse(s, views);
    for (View& v : views) mark(s, v);
    program_.views.insert(program_.views.end(), views.begin(), views.end());
    const i64 tiles = s.temps + s.inputs + s.outputs;
    const i64 fit = TILE_BYTES / (tiles * element_) / SLACK * SLACK;
    i64 all = 1;
    for (int d = 0; d < s.dims; ++d) all *= s.n[d];
    s.tile = std::clamp<i64>(fit, 4 * SLACK, 1024);
    s.tile = std::max<i64>(SLACK, std::min(s.tile, (all + SLACK - 1) / SLACK * SLACK));
    program_.tiles = std::max(program_.tiles, tiles * (s.tile + SLACK));
  }
  void widen_and_collapse(Step& s, std::vector<View>& views) const {
    if (lanes_ > 1) {
      for (View& v : views) {
        v.offset *= lanes_;
        for (int d = 0; d < s.dims; ++d) v.stride[d] *= lanes_;
        v.stride[s.dims] = 1;
      }
      s.n[s.dims++] = lanes_;
    }
    const auto drop = [&](int d) {
      for (int e = d; e + 1 < s.dims; ++e) {
        s.n[e] = s.n[e + 1];
        for (View& v : views) v.stride[e] = v.stride[e + 1];
      }
      --s.dims;
    };
    for (int d = s.dims - 1; d >= 0; --d)
      if (s.n[d] == 1) drop(d);
    for (int d = s.dims - 2; d >= 0; --d) {
      if (!std::all_of(views.begin(), views.end(),
                       [&](const View& v) { return v.stride[d] == s.n[d + 1] * v.stride[d + 1]; }))
        continue;
      s.n[d + 1] *= s.n[d];
      drop(d);
    }
    if (s.dims == 0) {
      s.dims = 1, s.n[0] = 1;
      for (View& v : views) v.stride[0] = 1;
    }
  }

  void reduce(Step& s) {
    s.reduced = int(word(0, s.dims, "the number of reduced dimensions"));
    s.reduction = Reduction(word(0, 2, "a reduction"));
    s.accumulate = word(0, 1, "a flag");
    View x = view(s, false), out = view(s, true);
    s.start = word(-MOST, MOST, "a start");
    for (int d = 0; d < s.dims; ++d) s.steps[d] = word(-MOST, MOST, "a step");
    for (int d = s.dims - s.reduced; d < s.dims; ++d)
      if (out.stride[d]) refuse("a reduction writes along what it sums up");
    if (s.accumulate && s.reduction != Reduction::sum) refuse("only sums add to what is there");
    if (x.space == int(Space::ints)) refuse("a reduction of integers");
    check(s, x), check(s, out);
    const int kept = s.dims - s.reduced;
    widen(s, {&x, &out}, kept, true);
    const int split = collapse(s, {&x, &out}, 0, kept + (lanes_ > 1));
    collapse(s, {&x, &out}, split, s.dims);
    s.reduced = s.dims - split;
    if (s.reduced == 0) {  // of one element
      s.n[s.dims] = 1, x.stride[s.dims] = 0, out.stride[s.dims] = 0, s.steps[s.dims] = 0;
      ++s.dims, ++s.reduced;
    }
    program_.views.push_back(x), program_.views.push_back(out);
  }

  void product(Step& s) {
    if (s.dims < 3) refuse("a product needs three dimensions");
    const int m = s.dims - 3, n = s.dims - 2, k = s.dims - 1;
    s.accumulate = word(0, 1, "a flag");
    s.more = word(0, MOST, "a size");
    s.relu = word(0, 1, "a flag"), s.starts = word(0, 1, "a flag"), s.gates = word(0, 1, "a flag");
    // out, a, b, two more factors, start, gate
    std::vector<int> places = {0, 1, 2};
    if (s.more) places.insert(places.end(), {3, 4});
    if (s.starts) places.push_back(5);
    if (s.gates) places.push_back(6);
    View views[7] = {};
    std::vector<View*> all;
    for (int at : places) {
      View& v = views[at] = view(s, at == 0);
      const bool left = at == 1 || at == 3, right = at == 2 || at == 4;
      if (v.stride[left ? n : right ? m : k]) refuse("a product along a dimension that it has not");
      if (v.space == int(Space::ints)) refuse("a product of integers");
      Step own = s;
      if (at == 3 || at == 4) own.n[k] = s.more;
      check(own, v);
      all.push_back(&v);
    }
    widen(s, all, 0, false);
    collapse(s, all, 0, s.dims - 3);
    program_.views.insert(program_.views.end(), views, views + 7);
  }

  void gather(Step& s) {
    s.wraps = word(0, 1, "a flag");
    s.accumulate = word(0, 1, "a flag");
    s.step = word(-MOST, MOST, "a step");
    s.limit = word(1, MOST, "a limit");
    if (s.kind == StepKind::gather && s.accumulate) refuse("a gather adds nothing");
    View out = view(s, true), source = view(s, false), index = view(s, false);
    if (source.space == int(Space::ints)) refuse("a gather of integers");
    if (__int128(s.limit - 1) * (s.step < 0 ? -s.step : s.step) > MOST) refuse("a step that cannot be");
    const i64 moved = (s.limit - 1) * s.step;
    const bool scatter = s.kind == StepKind::scatter;
    check(s, out, scatter ? moved : 0), check(s, source, scatter ? 0 : moved), check(s, index);
    s.step *= lanes_;
    widen(s, {&out, &source, &index}, s.dims, true);
    collapse(s, {&out, &source, &index}, 0, s.dims);
    need_a_dimension(s);
    for (const View& v : {out, source, index}) program_.views.push_back(v);
  }

  const Code& code_;
  const i64 lanes_, element_;
  size_t at_ = 0;
  Program program_;
  std::vector<size_t> first_view_, first_op_, first_number_;
};

}  // namespace

template <class S>
Program decode(const Code& code, i64 lanes) {
  return Decoder(code, lanes, sizeof(S)).read();
}

namespace {

// The elements that view v of a step may touch, [low, high).
struct Range {
  i64 low, high;
  bool meets(const Range& other) const { return low < other.high && other.low < high; }
};
Range range_of(const Step& s, const View& v, bool moves) {
  Range r{v.offset, v.offset + 1};
  for (int d = 0; d < s.dims; ++d) {
    const bool more = s.kind == StepKind::product && d == s.dims - 1;  // of either depth
    const i64 reach = ((more ? std::max(s.n[d], s.more) : s.n[d]) - 1) * v.stride[d];
    (reach < 0 ? r.low : r.high) += reach;
  }
  const i64 moved = moves ? (s.limit - 1) * s.step : 0;
  (moved < 0 ? r.low : r.high) += moved;
  return r;
}

// Calls body(range, whether it is written) for everything that a step touches in a space.
template <class Body>
void for_each_touched(const Step& s, Space space, const Body& body) {
  const bool product = s.kind == StepKind::product;
  const int views = s.kind == StepKind::map      ? s.inputs + s.outputs
                    : product                    ? 7
                    : s.kind == StepKind::reduce ? 2
                                                 : 3;
  for (int i = 0; i < views; ++i) {
    if (product && ((!s.more && (i == 3 || i == 4)) || (!s.starts && i == 5) || (!s.gates && i == 6)))
      continue;
    const View& v = s.views[i];
    if (v.space != int(space)) continue;
    const bool writes = s.kind == StepKind::map      ? i >= s.inputs
                        : s.kind == StepKind::reduce ? i == 1
                                                     : i == 0;
    const bool moves = (s.kind == StepKind::gather && i == 1) || (s.kind == StepKind::scatter && i == 0);
    body(range_of(s, v, moves), writes);
  }
}

// Whether a product writes just the elements [low, high), each once.
bool covers(const Step& s, const Range& all, i64 lanes) {
  const View& out = s.views[0];
  if (out.offset != all.low) return false;
  i64 done = lanes;
  for (bool found = true; found;) {
    found = false;
    for (int d = 0; d < s.dims - 1; ++d)
      if (s.n[d] > 1 && out.stride[d] == done && done < all.high - all.low) done *= s.n[d], found = true;
  }
  i64 elements = lanes;
  for (int d = 0; d < s.dims - 1; ++d) elements *= s.n[d];
  return done == all.high - all.low && elements == done;
}

}  // namespace

std::vector<bool> mark_updates(Program& program, size_t stage, Space result, Space direction, i64 lanes,
                               const std::vector<std::pair<i64, i64>>& parameters) {
  std::vector<bool> found(parameters.size(), false);
  if (stage >= program.stage_ends.size()) return found;
  const i64 first = program.stage_begin(stage), end = program.stage_ends[stage];
  for (size_t p = 0; p < parameters.size(); ++p) {
    const Range own{parameters[p].first * lanes, (parameters[p].first + parameters[p].second) * lanes};
    i64 last = -1;
    bool before = false, read = false;
    if (own.low == own.high) continue;
    for (i64 i = first; i < end; ++i) {
      for_each_touched(program.steps[i], result, [&](const Range& r, bool writes) {
        if (!r.meets(own)) return;
        before = last >= 0, last = i;
        read = !writes;
      });
    }
    if (last < 0 || read) continue;
    Step& s = program.steps[last];
    if (s.kind != StepKind::product || (before && !s.accumulate) || s.relu || s.gates || s.starts) continue;
    if (!covers(s, own, lanes)) continue;
    bool again = false;
    for (i64 i = last; direction != result && i < end; ++i)
      for_each_touched(program.steps[i], direction,
                       [&](const Range& r, bool) { again = again || r.meets(own); });
    if (!again) s.updates = int(p), found[p] = true;
  }
  return found;
}

template Program decode<float>(const Code&, i64);
template Program decode<double>(const Code&, i64);

}  // namespace fm::machine
