// Memory of megabytes: large pages and zeros for it, and whose the workspace of a thread is.
#include "vec.h"

namespace fastlm {

// t: elements that lie together, in any order of dimensions; its memory need not have been touched.
void large_pages(Tensor t) { prefer_huge_pages(t.data, static_cast<size_t>(t.numel() * itemsize(t.dtype))); }
FASTLM_EXPORT(large_pages);

// t: as above.
void zero(Tensor t) {
  const int64_t bytes = t.numel() * itemsize(t.dtype);
  parallel_for(bytes, static_cast<int64_t>(kHugePage), [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(t.data) + begin, 0, static_cast<size_t>(end - begin));
  });
}
FASTLM_EXPORT(zero);

// room: bytes on a 64-byte boundary that the functions called from this thread work in, until None comes.
void lend_scratch(Tensor room) { Scratch::lend(room.data, room.data ? static_cast<size_t>(room.numel()) : 0); }
FASTLM_EXPORT(lend_scratch);

}  // namespace fastlm
