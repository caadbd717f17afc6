// Put into a copy of the engine by mutate.py.
#pragma once
#include <cstdlib>
#include <string>

namespace fm {

// Calls body, with the wrong sign where the environment asks for it.
template <class S, class Body>
void flipped(const Pass<S>& pass, const Layer& layer, const char* kind, const char* function,
             const Body& body) {
  const char* wanted = std::getenv("FASTMETA_MUTATE");
  const std::string name = function;
  if (!wanted || std::string(kind) + " " + name != wanted || !pass.geometry.keeps(layer.output))
    return body();
  const auto negate = [&](S* block) {
    const i64 size = pass.rows(layer.output) * pass.plan.values[layer.output].ld;
    for (i64 i = 0; i < size; ++i) block[i] = -block[i];
  };
  const auto gradients = [&] {
    negate(pass.delta(layer.output));
    if (name == "tangent_backward") negate(pass.tangent_delta(layer.output));
  };
  const bool back = name == "backward" || name == "tangent_backward";
  if (back) gradients();
  body();
  if (back) gradients();
  if (name == "forward") negate(pass.output(layer.output));
  if (name == "tangent") negate(pass.tangent(layer.output));
}

}  // namespace fm
