// What a layer kind takes. Each file csrc/cpu/layers/<kind>.h has its RULES, and check.cpp holds
// every layer to them.
#pragma once

#include "plan.h"

namespace fm {

// What a constant of a layer is: any number; a size, a whole number from 0 on; an epsilon, which is
// finite and not negative.
enum class Constant : int { none, number, size, epsilon };

// Written as what a kind reads, one after the other: Rules(1).sizes(6).with_weight_and_bias().
struct Rules {
  int inputs;
  int least_constants = 0, most_constants = 0;
  Constant constants[MOST_CONSTANTS] = {};
  int params = 0, required_params = 0;  // required: so many of the first
  int buffers = 0;                      // so many of the last parameters are buffers
  bool weight = false;      // the first parameter is a matrix that products read, the second a bias
  bool function = false;    // names an element-wise function
  bool by_channel = false;  // a norm of channels
  bool may_be_adaptive = false;

  constexpr explicit Rules(int inputs) : inputs(inputs) {}
  constexpr Rules numbers(int least, int most) const { return with(Constant::number, least, most); }
  constexpr Rules sizes(int count) const { return with(Constant::size, count, count); }
  constexpr Rules sizes(int least, int most) const { return with(Constant::size, least, most); }
  constexpr Rules epsilon() const { return with(Constant::epsilon, 1, 1); }
  constexpr Rules with_params(int count, int required = 0) const {
    Rules more = *this;
    more.params = count, more.required_params = required;
    return more;
  }
  constexpr Rules with_buffers(int count) const {
    Rules more = *this;
    more.params += count, more.buffers = count;
    return more;
  }
  constexpr Rules with_weight_and_bias() const {
    Rules more = with_params(2, 1);
    more.weight = true;
    return more;
  }
  constexpr Rules normalising_channels() const {
    Rules more = *this;
    more.by_channel = true;
    return more;
  }
  constexpr Rules with_function() const {
    Rules more = *this;
    more.function = true;
    return more;
  }
  constexpr Rules or_adaptive() const {
    Rules more = *this;
    more.may_be_adaptive = true;
    return more;
  }

 private:
  constexpr Rules with(Constant what, int least, int most) const {
    Rules more = *this;
    for (int i = 0; i < most; ++i) more.constants[most_constants + i] = what;
    more.least_constants += least, more.most_constants += most;
    return more;
  }
};

// What a layer needs besides its values: elements that it keeps from forward on, and scratch memory
// while it runs.
struct Needs {
  i64 state = 0, temporary = 0;
};

}  // namespace fm
