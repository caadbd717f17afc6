// The memory of a caller's tensors. Tensors themselves are handed over, never addresses: whatever is read or written
// lies in storage that the tensor has, of the type and size that the plan says.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../engine/types.h"

namespace fm::binding {

namespace py = pybind11;

enum class Number : int { f32, f64, i64 };
constexpr fm::i64 bytes_of(Number number) { return number == Number::f32 ? 4 : 8; }

// What is asked of torch.Tensor, looked up once; never destroyed, as it may outlive the interpreter.
struct Torch {
  PyTypeObject *tensor, *parameter;
  py::object dtypes[3];  // by Number
  py::object dtype, is_cpu, nbytes, storage_nbytes;
  py::object data_ptr, is_contiguous, is_neg, untyped_storage, storage_offset;

  static const Torch& get() {
    static const Torch* const known = new Torch;
    return *known;
  }

 private:
  Torch() {
    const auto torch = py::module_::import("torch");
    const py::object type = torch.attr("Tensor"), storage = torch.attr("UntypedStorage");
    tensor = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
    const py::object parameters = torch.attr("nn").attr("Parameter");
    parameter = reinterpret_cast<PyTypeObject*>(parameters.inc_ref().ptr());
    dtypes[0] = torch.attr("float32"), dtypes[1] = torch.attr("float64"), dtypes[2] = torch.attr("int64");
    dtype = type.attr("dtype"), is_cpu = type.attr("is_cpu"), nbytes = type.attr("nbytes");
    data_ptr = type.attr("data_ptr"), is_contiguous = type.attr("is_contiguous"), is_neg = type.attr("is_neg");
    untyped_storage = type.attr("untyped_storage"), storage_offset = type.attr("storage_offset");
    storage_nbytes = storage.attr("nbytes");
  }
};

// Where a tensor stands among the arguments, for messages.
struct Place {
  const char* field;
  std::size_t index;
  [[noreturn]] void refuse(const std::string& what) const { throw std::invalid_argument(name() + " " + what); }
  std::string name() const { return std::string("Plan.run: ") + field + "[" + std::to_string(index) + "]"; }
};

// Reads tensors, and holds on to them and to the dense copies of those that are not dense.
class Tensors {
 public:
  explicit Tensors(std::size_t expected) { held_.reserve(expected); }

  // The items of a list: later changes of it do not matter.
  std::vector<py::handle> items(const py::list& list) {
    std::vector<py::handle> all;
    all.reserve(list.size());
    for (const py::handle item : list) all.push_back(hold(py::reinterpret_borrow<py::object>(item)));
    return all;
  }

  // How many numbers a tensor holds, by its own word: for what is checked against it afterwards.
  i64 count(py::handle tensor, const Place& place, Number number) {
    check_type(tensor, place);
    return integer(field(Torch::get().nbytes, tensor)) / bytes_of(number);
  }
  // Memory of `count` numbers to read; null for None.
  const void* read(py::handle tensor, const Place& place, i64 count, Number number) {
    return memory(tensor, place, count, number, false);
  }
  // Memory of `count` numbers to write; null for None.
  void* write(py::handle tensor, const Place& place, i64 count, Number number) {
    return memory(tensor, place, count, number, true);
  }

 private:
  void* memory(py::handle tensor, const Place& place, i64 count, Number number, bool writes) {
    if (tensor.is_none()) return nullptr;
    const Torch& torch = Torch::get();
    check_type(tensor, place);
    const py::object dtype = field(torch.dtype, tensor);
    if (!dtype.is(torch.dtypes[int(number)]))
      place.refuse("must be " + text(torch.dtypes[int(number)]) + ", got " + text(dtype));
    if (field(torch.is_cpu, tensor).ptr() != Py_True) place.refuse("must be on the cpu");
    const i64 size = integer(field(torch.nbytes, tensor)), wanted = count * bytes_of(number);
    if (size != wanted)
      place.refuse("must hold " + std::to_string(count) + " numbers, got " + std::to_string(size / bytes_of(number)));
    if (call(torch.is_contiguous, tensor).ptr() != Py_True || call(torch.is_neg, tensor).ptr() != Py_False) {
      if (writes) place.refuse("must be contiguous");
      tensor = hold(tensor.attr("detach")().attr("resolve_neg")().attr("contiguous")());
    }
    // a tensor's storage may have been freed or made smaller
    const py::object storage = call(torch.untyped_storage, tensor);
    const i64 begin = integer(call(torch.storage_offset, tensor)) * bytes_of(number);
    const i64 there = integer(call(torch.storage_nbytes, storage));
    void* const data = PyLong_AsVoidPtr(call(torch.data_ptr, tensor).ptr());
    if (begin < 0 || begin + size > there || !data)
      place.refuse("has no memory: its storage holds " + std::to_string(there) + " bytes where the tensor needs " +
                   std::to_string(begin + size));
    return data;
  }

  static void check_type(py::handle tensor, const Place& place) {
    const Torch& torch = Torch::get();
    PyTypeObject* const type = Py_TYPE(tensor.ptr());
    if (type != torch.tensor && type != torch.parameter)
      throw py::type_error(place.name() + " must be a torch.Tensor or None, got " + type->tp_name);
  }

  py::handle hold(py::object object) {
    held_.push_back(std::move(object));
    return held_.back();
  }

  static py::object checked(PyObject* result) {
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }
  // tensor.<attribute>, tensor.<method>(), without the search for their names.
  static py::object field(const py::object& descriptor, py::handle of) {
    const descrgetfunc get = Py_TYPE(descriptor.ptr())->tp_descr_get;
    return checked(get(descriptor.ptr(), of.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(of.ptr()))));
  }
  static py::object call(const py::object& method, py::handle of) {
    PyObject* const self = of.ptr();
    return checked(PyObject_Vectorcall(method.ptr(), &self, 1, nullptr));
  }
  static i64 integer(const py::object& number) {
    const i64 value = PyLong_AsLongLong(number.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  static std::string text(const py::object& of) { return py::str(of).cast<std::string>(); }

  std::vector<py::object> held_;
};

}  // namespace fm::binding
