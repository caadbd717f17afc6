// What all norms ask of their shapes.
#pragma once

#include "../pass.h"

namespace fm {

// A norm keeps the shape; each of its parameters has `size` elements.
inline void check_norm(const Plan& plan, const Layer& layer, i64 size) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require((layer.pool_h || x.rows == y.rows) && x.cols == y.cols, "a norm changes the shape");
  for (int p : layer.params)
    require(p < 0 || (!plan.params[p].matrix && plan.params[p].cols == size),
            "a norm's parameter has another shape");
}

}  // namespace fm
