// The Python face of an extension module: every registered function as a callable. The only file that knows
// pybind11. init.cpp gives it the module's name.
//
// A function takes its arguments by position: None, bool, int, float, str, or a tensor as the tuple
// (address, dtype code, shape, strides in elements). fastlm/native.py makes those tuples.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "tensor.h"

namespace py = pybind11;

namespace fastlm {
extern const char* const build;  // in init.cpp
}
using namespace fastlm;

std::vector<Function>& fastlm::registry() {
  static std::vector<Function> functions;
  return functions;
}

namespace {

// Where the conversion stands, for its error messages.
struct Place {
  const char* function;
  size_t index;
};

int64_t to_int(PyObject* o, Place at, const char* what) {
  const long long v = PyLong_AsLongLong(o);
  if (v == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    require(false, at.function, ": argument ", at.index, ": ", what, " must be an int that fits 64 bits");
  }
  return v;
}

void to_ints(PyObject* o, int64_t* out, int ndim, Place at, const char* what) {
  require(PyTuple_Check(o) && PyTuple_GET_SIZE(o) == ndim, at.function, ": argument ", at.index, ": ", what,
          " must be a tuple of ", ndim, " ints");
  for (int i = 0; i < ndim; ++i) out[i] = to_int(PyTuple_GET_ITEM(o, i), at, what);
}

Tensor to_tensor(PyObject* o, Place at) {
  require(PyTuple_GET_SIZE(o) == 4, at.function, ": argument ", at.index,
          ": a tensor is a tuple (address, dtype code, shape, strides), got a tuple of ",
          PyTuple_GET_SIZE(o));
  Tensor t;
  const void* address = PyLong_AsVoidPtr(PyTuple_GET_ITEM(o, 0));
  if (PyErr_Occurred()) {
    PyErr_Clear();
    require(false, at.function, ": argument ", at.index, ": the address must be an int");
  }
  t.data = const_cast<void*>(address);
  const int64_t code = to_int(PyTuple_GET_ITEM(o, 1), at, "the dtype code");
  require(code >= 0 && code < kDTypeCount, at.function, ": argument ", at.index,
          ": the dtype code must be in 0 to ", kDTypeCount - 1, ", got ", code);
  t.dtype = static_cast<DType>(code);
  PyObject* shape = PyTuple_GET_ITEM(o, 2);
  require(PyTuple_Check(shape) && PyTuple_GET_SIZE(shape) <= kMaxDims, at.function, ": argument ", at.index,
          ": the shape must be a tuple of at most ", kMaxDims, " ints");
  t.ndim = static_cast<int>(PyTuple_GET_SIZE(shape));
  to_ints(shape, t.shape, t.ndim, at, "the shape");
  to_ints(PyTuple_GET_ITEM(o, 3), t.stride, t.ndim, at, "the strides");
  for (int i = 0; i < t.ndim; ++i)
    require(t.shape[i] >= 0, at.function, ": argument ", at.index, ": negative size ", t.shape[i]);
  require(t.data != nullptr || t.numel() == 0, at.function, ": argument ", at.index,
          ": a null address for a tensor of ", t.numel(), " elements");
  return t;
}

Value to_value(PyObject* o, Place at) {
  if (o == Py_None) return std::monostate{};
  if (PyTuple_Check(o)) return to_tensor(o, at);
  if (PyBool_Check(o)) return o == Py_True;
  if (PyLong_Check(o)) return to_int(o, at, "the value");
  if (PyFloat_Check(o)) return PyFloat_AS_DOUBLE(o);
  if (PyUnicode_Check(o)) return py::cast<std::string>(o);
  require(false, at.function, ": argument ", at.index,
          " must be a tensor, None, bool, int, float or str, got ", Py_TYPE(o)->tp_name);
  return {};
}

py::object to_python(const Value& v) {
  if (const auto* b = std::get_if<bool>(&v)) return py::bool_(*b);
  if (const auto* i = std::get_if<int64_t>(&v)) return py::int_(*i);
  if (const auto* d = std::get_if<double>(&v)) return py::float_(*d);
  return py::none();
}

py::object run(const Function& f, const py::args& args) {
  const size_t n = args.size();
  std::vector<Value> values;
  values.reserve(n);
  for (size_t i = 0; i < n; ++i) values.push_back(to_value(PyTuple_GET_ITEM(args.ptr(), i), {f.name, i}));
  Value result;
  {
    py::gil_scoped_release release;
    result = f.call(f.name, values);
  }
  return to_python(result);
}

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__) + "." +
         std::to_string(__clang_patchlevel__);
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown compiler";
#endif
}

// The widest variant that this chip can run, by the name of its module.
std::string best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return "avx512_bf16";
  if (avx512) return "avx512";
  if (avx2) return "avx2";
#endif
  return "portable";
}

}  // namespace

PYBIND11_MODULE(native, m) {
  m.doc() = "fastlm's native kernels; call them through fastlm.native";
  auto& functions = registry();
  std::sort(functions.begin(), functions.end(),
            [](const Function& a, const Function& b) { return std::strcmp(a.name, b.name) < 0; });
  py::list names;
  for (const Function& f : functions) {
    m.def(f.name, [f](const py::args& args) { return run(f, args); });
    names.append(f.name);
  }
  m.def("functions", [names] { return py::list(names); }, "Names of the kernels in this module, sorted.");
  m.def(
      "dtypes",
      [] {
        py::list out;
        for (const char* n : kDTypeNames) out.append(n);
        return out;
      },
      "Names of the dtypes; the position is the code.");
  m.def("best_isa", &best_isa, "The widest CPU variant that this chip can run.");
  m.attr("build") = compiler() + ", " + build;
}
