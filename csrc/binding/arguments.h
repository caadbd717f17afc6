// The arguments of one function by their names. pybind11's own message for wrong ones shows all of
// them, and showing a tensor without memory ends the process: here a message has a name and a type.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <string>

namespace fm::binding {

namespace py = pybind11;

// All of `names`, in their order.
template <std::size_t N>
std::array<py::handle, N> arguments(const char* who, const char* const (&names)[N], const py::args& args,
                                    const py::kwargs& kwargs) {
  const auto refuse = [&](const std::string& what) { throw py::type_error(std::string(who) + ": " + what); };
  std::array<py::handle, N> found;
  if (args.size() > N) refuse("too many arguments");
  for (std::size_t i = 0; i < args.size(); ++i) found[i] = PyTuple_GET_ITEM(args.ptr(), py::ssize_t(i));
  if (PyDict_GET_SIZE(kwargs.ptr()))
    for (const auto& [key, value] : kwargs) {
      const std::string name = py::str(key);
      std::size_t i = 0;
      while (i < N && name != names[i]) ++i;
      if (i == N) refuse("unexpected argument '" + name.substr(0, 100) + "'");
      if (found[i]) refuse("'" + name + "' was given twice");
      found[i] = value;
    }
  for (std::size_t i = 0; i < N; ++i)
    if (!found[i]) refuse(std::string("'") + names[i] + "' is missing");
  return found;
}

}  // namespace fm::binding
