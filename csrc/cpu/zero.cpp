// Zeros, written by all threads: what large gradients start from.
#include "vec.h"

namespace fastlm {

// t: elements that lie together, in any order of dimensions.
void zero(Tensor t) {
  const int64_t bytes = t.numel() * itemsize(t.dtype);
  prefer_huge_pages(t.data, static_cast<size_t>(bytes));
  parallel_for(bytes, static_cast<int64_t>(kHugePage), [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(t.data) + begin, 0, static_cast<size_t>(end - begin));
  });
}
FASTLM_EXPORT(zero);

}  // namespace fastlm
