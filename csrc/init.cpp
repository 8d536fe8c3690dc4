// The entry point of one extension module under its own name, and what it was built with. All else about a
// module is module.cpp, which takes the longest to compile and is the same for all, so it is compiled once.
#define FASTLM_JOIN(a, b) a##b
#define FASTLM_ENTRY(module) FASTLM_JOIN(PyInit_, module)

extern "C" void* PyInit_native();

namespace fastlm {
extern const char* const build;
const char* const build = FASTLM_BUILD;
}  // namespace fastlm

extern "C" __attribute__((visibility("default"))) void* FASTLM_ENTRY(FASTLM_MODULE)() {
  return PyInit_native();
}
