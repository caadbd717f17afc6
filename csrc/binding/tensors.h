// The memory of a caller's tensors. Tensors themselves are handed over, never addresses: whatever
// is read or written lies in storage that the tensor has, of the type and size that the plan says.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../shared/types.h"
#include "dlpack.h"

namespace fm::binding {

namespace py = pybind11;

enum class Number : int { f32, f64, i64 };
constexpr fm::i64 bytes_of(Number number) { return number == Number::f32 ? 4 : 8; }

// What is asked of torch.Tensor, looked up once; never destroyed, as it may outlive the
// interpreter.
struct Torch {
  PyTypeObject *tensor, *parameter;
  py::object dtypes[3];  // by Number
  py::object dtype, is_cpu, nbytes, storage_nbytes;
  py::object data_ptr, is_contiguous, is_neg, untyped_storage, storage_offset;
  const dlpack::ExchangeApi* exchange = nullptr;  // since torch 2.10

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
    data_ptr = type.attr("data_ptr"), is_contiguous = type.attr("is_contiguous"),
    is_neg = type.attr("is_neg");
    untyped_storage = type.attr("untyped_storage"), storage_offset = type.attr("storage_offset");
    storage_nbytes = storage.attr("nbytes");
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return;
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* api =
        static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) PyErr_Clear();
    if (api && api->major == dlpack::MAJOR && api->tensor_from) exchange = api;
  }
};

// Where a tensor stands among the arguments, for messages.
struct Place {
  const char* field;
  std::size_t index;
  const char* function = "Plan.run";
  [[noreturn]] void refuse(const std::string& what) const {
    throw std::invalid_argument(name() + " " + what);
  }
  std::string name() const {
    return std::string(function) + ": " + field + "[" + std::to_string(index) + "]";
  }
};

// Reads tensors, and holds on to them and to the dense copies of those that are not dense.
class Tensors {
 public:
  explicit Tensors(std::size_t expected) { held_.reserve(expected); }

  // The items of a list: later changes of it do not matter.
  std::vector<py::handle> items(py::handle list) {
    const auto size = std::size_t(PyList_GET_SIZE(list.ptr()));
    std::vector<py::handle> all(size);
    for (std::size_t i = 0; i < size; ++i)
      all[i] = hold(py::reinterpret_borrow<py::object>(PyList_GET_ITEM(list.ptr(), py::ssize_t(i))));
    return all;
  }

  // How many numbers a tensor holds.
  i64 count(py::handle tensor, const Place& place, Number number) {
    return look(tensor, place, number).count;
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
  struct Dense {
    void* data;
    i64 count;
    bool contiguous;
  };

  void* memory(py::handle tensor, const Place& place, i64 count, Number number, bool writes) {
    if (tensor.is_none()) return nullptr;
    try {
      return checked_memory(tensor, place, count, number, writes);
    } catch (
        py::error_already_set& error) {  // PyTorch's own, of a tensor that has nothing of what was asked for
      if (!error.matches(PyExc_RuntimeError)) throw;
      const std::string why = error.what();
      place.refuse("must be a dense tensor with memory: " + why.substr(0, why.find('\n')));
    }
  }

  void* checked_memory(py::handle tensor, const Place& place, i64 count, Number number, bool writes) {
    const Torch& torch = Torch::get();
    Dense dense = look(tensor, place, number);
    if (dense.count != count)
      place.refuse("must hold " + std::to_string(count) + " numbers, got " + std::to_string(dense.count));
    if (writes && !dense.contiguous) place.refuse("must be contiguous");
    if (!writes && (!dense.contiguous || call(torch.is_neg, tensor).ptr() != Py_False)) {
      check_storage(tensor, place, -1, number);
      tensor = hold(tensor.attr("detach")().attr("resolve_neg")().attr("contiguous")());
      dense = look(tensor, place, number);
    }
    check_storage(tensor, place, count, number);
    if (!dense.data) place.refuse("has no memory");
    return dense.data;
  }

  // Type, dtype and device are checked here; the rest is told.
  static Dense look(py::handle tensor, const Place& place, Number number) {
    check_type(tensor, place);
    const Torch& torch = Torch::get();
    if (!torch.exchange) return look_by_methods(tensor, place, number);
    dlpack::Tensor t;
    if (torch.exchange->tensor_from(tensor.ptr(), &t) != 0) {
      if (!PyErr_Occurred()) place.refuse("must be a dense tensor with memory");
      throw py::error_already_set();
    }
    const auto code = number == Number::i64 ? dlpack::INT : dlpack::FLOAT;
    if (t.code != code || t.bits != 8 * bytes_of(number) || t.lanes != 1) refuse_dtype(tensor, place, number);
    if (t.device_type != dlpack::CPU) place.refuse("must be on the cpu");
    i64 count = 1;
    bool contiguous = true;
    for (int d = t.ndim - 1; d >= 0; --d) {
      contiguous = contiguous && (t.shape[d] == 1 || t.strides[d] == count);
      count *= t.shape[d];
    }
    return {t.data, count, contiguous};
  }

  static Dense look_by_methods(py::handle tensor, const Place& place, Number number) {
    const Torch& torch = Torch::get();
    if (!field(torch.dtype, tensor).is(torch.dtypes[int(number)])) refuse_dtype(tensor, place, number);
    if (field(torch.is_cpu, tensor).ptr() != Py_True) place.refuse("must be on the cpu");
    return {PyLong_AsVoidPtr(call(torch.data_ptr, tensor).ptr()),
            integer(field(torch.nbytes, tensor)) / bytes_of(number),
            call(torch.is_contiguous, tensor).ptr() == Py_True};
  }

  // A tensor's storage may have been freed or made smaller. `count` numbers in a row are needed of
  // it, or, with -1, whatever the tensor's strides reach.
  static void check_storage(py::handle tensor, const Place& place, i64 count, Number number) {
    const Torch& torch = Torch::get();
    const py::object storage = call(torch.untyped_storage, tensor);
    const i64 there = integer(call(torch.storage_nbytes, storage)), size = bytes_of(number);
    i64 end = integer(call(torch.storage_offset, tensor)) + count;
    if (count < 0) {
      end += 2;
      const py::tuple shape(tensor.attr("shape")), strides(tensor.attr("stride")());
      for (std::size_t d = 0; d < shape.size(); ++d)
        end += (shape[d].cast<i64>() - 1) * strides[d].cast<i64>();
    }
    if (end > there / size)
      place.refuse("has no memory: its storage holds " + std::to_string(there) +
                   " bytes, and the tensor needs " + std::to_string(end * size));
  }

  [[noreturn]] static void refuse_dtype(py::handle tensor, const Place& place, Number number) {
    const Torch& torch = Torch::get();
    place.refuse("must be " + text(torch.dtypes[int(number)]) + ", got " + text(tensor.attr("dtype")));
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
