// What crosses from Python into native code: tensors by address, plain scalars, and the registry of
// functions. Neither torch nor pybind11 is known here, so a file that includes only this compiles in about a
// second.
//
// An op file defines `void layer_norm_forward(Tensor x, Tensor weight, double eps, Tensor y)` and then says
// `FASTLM_EXPORT(layer_norm_forward);`. Parameters may be Tensor, double, int64_t, bool, std::string, and
// std::optional of the last four; the result may be void, double, int64_t or bool. A Python None becomes an
// undefined Tensor or an empty optional. CUDA functions take the stream as a last `int64_t stream`; a
// function f that needs workspace takes it before that as `Tensor workspace`, of as many bytes as an exported
// `int64_t f_workspace(<the arguments before>)` says. fastlm/native.py adds both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastlm {

enum class DType : int { float32, bfloat16, float16, float64, int64, int32, int16, int8, uint8, boolean };

// In the order of DType; the names are torch's, and Python builds its table of codes from them.
constexpr const char* kDTypeNames[] = {"float32", "bfloat16", "float16", "float64", "int64",
                                       "int32",   "int16",    "int8",    "uint8",   "bool"};
constexpr int kDTypeCount = sizeof(kDTypeNames) / sizeof(kDTypeNames[0]);
constexpr int kMaxDims = 8;

inline const char* name(DType t) { return kDTypeNames[static_cast<int>(t)]; }

inline int64_t itemsize(DType t) {
  constexpr int64_t sizes[kDTypeCount] = {4, 2, 2, 8, 8, 4, 2, 1, 1, 1};
  return sizes[static_cast<int>(t)];
}

// A bfloat16 as it lies in memory: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Rounds to nearest even, as the chip and torch do; NaN stays NaN.
inline bf16 to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if (f != f) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T> struct dtype_of;
template <> struct dtype_of<float> {
  static constexpr DType value = DType::float32;
};
template <> struct dtype_of<bf16> {
  static constexpr DType value = DType::bfloat16;
};
template <> struct dtype_of<double> {
  static constexpr DType value = DType::float64;
};
template <> struct dtype_of<int64_t> {
  static constexpr DType value = DType::int64;
};
template <> struct dtype_of<int32_t> {
  static constexpr DType value = DType::int32;
};
template <> struct dtype_of<int16_t> {
  static constexpr DType value = DType::int16;
};
template <> struct dtype_of<int8_t> {
  static constexpr DType value = DType::int8;
};
template <> struct dtype_of<uint8_t> {
  static constexpr DType value = DType::uint8;
};
template <> struct dtype_of<bool> {
  static constexpr DType value = DType::boolean;
};
#if defined(__CUDACC__)
template <> struct dtype_of<__nv_bfloat16> {
  static constexpr DType value = DType::bfloat16;
};
template <> struct dtype_of<__half> {
  static constexpr DType value = DType::float16;
};
#endif

// Throws std::invalid_argument (a Python ValueError) with the parts of the message put together.
template <class... Parts> void require(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// A view of memory that Python owns for the length of the call. Strides count elements.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::float32;
  int ndim = -1;  // -1: the argument was None
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  bool defined() const { return ndim >= 0; }

  int64_t numel() const {
    if (!defined()) return 0;
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

  // Size of a dimension; negative counts from the end.
  int64_t size(int dim) const { return shape[dim < 0 ? dim + ndim : dim]; }

  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }

  template <class T> bool is() const { return defined() && dtype == dtype_of<T>::value; }

  // Typed address; null for an undefined tensor. A wrong dtype is a ValueError.
  template <class T> T* as() const {
    if (!defined()) return nullptr;
    require(is<T>(), "expected a ", name(dtype_of<T>::value), " tensor, got ", name(dtype));
    return static_cast<T*>(data);
  }

  // Address of an output that the caller wants; null for None and for an empty tensor.
  template <class T> T* wanted() const { return numel() == 0 ? nullptr : as<T>(); }
};

using Value = std::variant<std::monostate, bool, int64_t, double, std::string, Tensor>;

struct Function {
  const char* name;
  int arity;
  Value (*call)(const char* name, const std::vector<Value>& arguments);
};

std::vector<Function>& registry();  // in module.cpp

namespace detail {

inline std::string describe(const Value& v) {
  struct {
    std::string operator()(std::monostate) const { return "None"; }
    std::string operator()(bool b) const { return b ? "True" : "False"; }
    std::string operator()(int64_t i) const { return "the int " + std::to_string(i); }
    std::string operator()(double d) const { return "the float " + std::to_string(d); }
    std::string operator()(const std::string& s) const { return "the str '" + s + "'"; }
    std::string operator()(const Tensor& t) const { return std::string("a ") + name(t.dtype) + " tensor"; }
  } visitor;
  return std::visit(visitor, v);
}

template <class T> struct is_optional : std::false_type {};
template <class T> struct is_optional<std::optional<T>> : std::true_type {};

template <class T> constexpr const char* type_name() {
  if constexpr (is_optional<T>::value) return type_name<typename T::value_type>();
  else if constexpr (std::is_same_v<T, Tensor>) return "a tensor";
  else if constexpr (std::is_same_v<T, bool>) return "a bool";
  else if constexpr (std::is_same_v<T, int64_t>) return "an int";
  else if constexpr (std::is_same_v<T, double>) return "a float";
  else return "a str";
}

template <class T> T unpack(const char* function, size_t index, const Value& v) {
  if constexpr (std::is_same_v<T, Tensor>) {
    if (std::holds_alternative<std::monostate>(v)) return Tensor{};
  } else if constexpr (is_optional<T>::value) {
    if (std::holds_alternative<std::monostate>(v)) return std::nullopt;
    using U = typename T::value_type;
    if (std::holds_alternative<U>(v)) return std::get<U>(v);
  }
  if constexpr (std::is_same_v<T, double> || std::is_same_v<T, std::optional<double>>) {
    if (const auto* i = std::get_if<int64_t>(&v)) return static_cast<double>(*i);
  }
  if constexpr (!is_optional<T>::value) {
    if (const auto* p = std::get_if<T>(&v)) return *p;
  }
  const bool nullable = std::is_same_v<T, Tensor> || is_optional<T>::value;
  require(false, function, ": argument ", index, " must be ", type_name<T>(), nullable ? " or None" : "",
          ", got ", describe(v));
  return T{};  // unreachable
}

template <auto F> struct Wrap;
template <class R, class... Args, R (*F)(Args...)> struct Wrap<F> {
  static constexpr int arity = sizeof...(Args);

  static Value call(const char* name, const std::vector<Value>& arguments) {
    require(arguments.size() == sizeof...(Args), name, ": takes ", arity, " arguments, got ",
            arguments.size());
    return expand(name, arguments, std::index_sequence_for<Args...>{});
  }

  template <size_t... I>
  static Value expand(const char* name, const std::vector<Value>& arguments, std::index_sequence<I...>) {
    // Braces: arguments are checked from left to right, so the first bad one is the one named.
    std::tuple<std::decay_t<Args>...> typed{unpack<std::decay_t<Args>>(name, I, arguments[I])...};
    if constexpr (std::is_void_v<R>) {
      std::apply(F, typed);
      return std::monostate{};
    } else {
      return Value(std::in_place_type<R>, std::apply(F, typed));
    }
  }
};

}  // namespace detail

struct Registration {
  Registration(const char* name, int arity, Value (*call)(const char*, const std::vector<Value>&)) {
    registry().push_back({name, arity, call});
  }
};

#define FASTLM_EXPORT(function)                                       \
  static const ::fastlm::Registration fastlm_registration_##function( \
      #function, ::fastlm::detail::Wrap<&function>::arity, &::fastlm::detail::Wrap<&function>::call)

}  // namespace fastlm
