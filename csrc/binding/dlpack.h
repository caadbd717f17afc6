// What is needed of DLPack's C exchange API (dlpack.h 1.3): a tensor's memory without a call
// through Python.
// Source: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace fm::binding::dlpack {

constexpr std::uint32_t MAJOR = 1;
constexpr std::int32_t CPU = 1;
enum Code : std::uint8_t { INT = 0, FLOAT = 2 };

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major, minor;
  void* older;
  void *allocate, *managed_from, *managed_to;
  int (*tensor_from)(void* object, Tensor* out);  // not null for PyTorch
  void* stream;
};

}  // namespace fm::binding::dlpack
