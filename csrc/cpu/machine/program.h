// A list of instructions, read from numbers and checked: whatever it says, running it stays inside
// of its spaces.
#pragma once

#include <array>
#include <cstddef>
#include <utility>
#include <vector>

#include "steps.h"

namespace fm::machine {

using Sizes = std::array<i64, SPACES>;  // elements of each space, for one task

struct Program {
  std::vector<Step> steps;
  std::vector<View> views;
  std::vector<MicroOp> ops;
  std::vector<char> splats;
  std::vector<i64> stage_ends;  // instructions of stage i end here
  Sizes sizes{};
  i64 tiles = 0;  // elements of temporaries

  Program() = default;
  Program(Program&&) = default;
  Program& operator=(Program&&) = default;
  Program(const Program&) = delete;  // steps point into it

  i64 stage_begin(std::size_t stage) const { return stage == 0 ? 0 : stage_ends[stage - 1]; }
};

// What Python hands over: instructions one after the other as fastmeta/backends/machine/encode.py
// writes them.
struct Code {
  std::vector<i64> words;
  std::vector<double> numbers;
  std::vector<i64> stage_counts;  // instructions of each stage
  Sizes sizes{};
};

// lanes: 1, or tasks side by side. Throws std::invalid_argument for what is no program.
template <class S>
Program decode(const Code& code, i64 lanes);

// Finds the products of a stage that complete the gradient, in space `result`, of a whole parameter
// (its place and size in theta), after which nothing of the stage reads that nor the parameter's
// elements of space `direction` (`result` for none); which parameters have one. None is looked for
// where a size is 0.
std::vector<bool> mark_updates(Program& program, std::size_t stage, Space result, Space direction, i64 lanes,
                               const std::vector<std::pair<i64, i64>>& parameters);

}  // namespace fm::machine
