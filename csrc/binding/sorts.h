// What a plan depends on of tensors, as the key that it is found by: read at every call.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "tensors.h"

namespace fm::binding {

// Dtype, device and shape of every tensor in a list, as bytes that are equal where all of these
// are. None where an item is anything else than an ordinary dense tensor or None, and where PyTorch
// is too old.
inline py::object sorts(py::handle list) {
  const Torch& torch = Torch::get();
  if (!torch.exchange || !PyList_Check(list.ptr())) return py::none();
  const Py_ssize_t size = PyList_GET_SIZE(list.ptr());
  std::vector<std::int64_t> words;
  words.reserve(std::size_t(size) * 6);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* const item = PyList_GET_ITEM(list.ptr(), i);
    if (item == Py_None) {
      words.push_back(-1);
      continue;
    }
    if (Py_TYPE(item) != torch.tensor && Py_TYPE(item) != torch.parameter) return py::none();
    dlpack::Tensor t;
    if (torch.exchange->tensor_from(item, &t) != 0) {  // sparse, for example
      PyErr_Clear();
      return py::none();
    }
    words.push_back(t.ndim);
    words.push_back((std::int64_t(t.code) << 32) | (std::int64_t(t.bits) << 16) | t.lanes);
    words.push_back((std::int64_t(t.device_type) << 32) | std::uint32_t(t.device_id));
    words.insert(words.end(), t.shape, t.shape + t.ndim);
  }
  return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(words[0]));
}

}  // namespace fm::binding
