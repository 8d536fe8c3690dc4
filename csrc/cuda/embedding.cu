// Embedding: y[t] = weight[ids[t]] (+ position_weight[positions[t]]) (+ segment_weight[segments[t]]), and the
// sums over the tokens of each row that are its gradients. A row that a table has not is NaN, and counts
// nowhere.
//
// Forward, one launch: a warp a token reads its rows and writes its result, all 16 bytes a lane.
//
// Backward, for each gradient that is wanted:
//  - Sort. (row, token) pairs of 8 bytes go through a radix sort, 9 bits of the row at a time: the places of
//    each digit are counted in each tile, the counts added up in one block, the pairs scattered. Only
//    integers are added atomically, and equal rows stay in the order of tokens. Tokens that count nowhere
//    come last; their dy is not read. 3 launches and 24 bytes a token for 9 bits: 6 launches and 1.6 MB for
//    32768 tokens and tables of 512 to 262143 rows, 50304 and 128256 among them. Counted positions and absent
//    segments are in order by a formula and need no sort.
//  - Sum. Equal rows are runs. All places are cut into about sqrt(8 tokens) pieces of 32 places or more, a
//    warp each for a stripe of columns. A run within its piece is added to the gradient at once, in the order
//    of tokens; one that crosses into other pieces leaves a partial sum in each.
//  - Join. Where such a run began, a block adds its partial sums in the order of pieces, a share in each
//    warp.
// Sum and join are 2 launches; dy is read once (50 MB for 32768 tokens of 768 bfloat16, 268 MB of 4096), a
// row of the gradient that has tokens is read and written once, each element by one thread. A piece writes at
// most 2 partial rows of float32, which are read once: for 32768 tokens, 512 pieces of 64 places, at most an
// eighth of the bytes of dy. One word in all places is summed by 512 warps a stripe, 64 rows each, and then
// by 8 warps a stripe, 64 partial rows each.
//
// All sizes follow from the arguments' shapes: the host waits for nothing, and the bits never change.
#include <climits>

#include "device.cuh"

namespace fastlm {
namespace {

constexpr int kWarpsPerBlock = 4;  // each with a token of its own, or a piece
constexpr int kDigitBits = 9, kRadix = 1 << kDigitBits;
constexpr int kSortWarps = 8, kSortThreads = 32 * kSortWarps;
constexpr int kRounds = 4, kChunk = kRounds * kSortThreads;  // places that a block ranks at a time
constexpr int64_t kTiles = 128;
constexpr int kAhead = 4;      // rows of dy that a lane has in flight
constexpr int kJoinWarps = 8;  // that share the pieces of a run

// The row of a table for each token: given, int64 or int32; counted from 0 to `period`, again and again; or
// 0.
struct Index {
  Index(const Tensor& t, const char* what, int64_t tokens, int64_t rows, int64_t period)
      : wide(t.is<int64_t>() ? t.as<int64_t>() : nullptr),
        narrow(t.is<int64_t>() ? nullptr : t.as<int32_t>()),
        period(period > 0 ? period : 1),
        rows(rows) {
    require(!t.defined() || t.numel() == tokens, what, " must have ", tokens, " elements, got ", t.numel());
    require(t.defined() || period <= rows, what, ": their table must have ", period, " rows, got ", rows);
  }

  bool given() const { return wide || narrow; }
  __device__ int64_t at(int64_t t) const { return wide ? wide[t] : narrow ? narrow[t] : t % period; }
  __device__ bool has(int64_t row) const { return row >= 0 && row < rows; }

  const int64_t* wide;
  const int32_t* narrow;
  int64_t period, rows;
};

template <class T> struct Table {
  const T* data;  // null: there is no such table
  Index index;

  // Token t's row; null if there is none.
  __device__ const T* row(int64_t t, int64_t h) const {
    if (!data) return nullptr;
    const int64_t row = index.at(t);
    return index.has(row) ? data + row * h : nullptr;
  }
};

// A part of a row from `column` on; NaN for a row that is not there.
template <int VEC, class T> __device__ inline void load_row(const T* row, int64_t column, float (&out)[VEC]) {
  if (row) return load_pack<VEC>(row + column, out);
#pragma unroll
  for (int j = 0; j < VEC; ++j) out[j] = NAN;
}

template <class T, int VEC>
__global__ void __launch_bounds__(32 * kWarpsPerBlock)
    forward_kernel(Table<T> weight, Table<T> position, Table<T> segment, T* y, int64_t tokens, int64_t h) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (t >= tokens) return;
  const T *word = weight.row(t, h), *place = position.row(t, h), *kind = segment.row(t, h);
  for (int64_t column = threadIdx.x * VEC; column < h; column += 32 * VEC) {
    float sum[VEC], part[VEC];
    load_row<VEC>(word, column, sum);
    if (position.data) {
      load_row<VEC>(place, column, part);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] += part[j];
    }
    if (segment.data) {
      load_row<VEC>(kind, column, part);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] += part[j];
    }
    store_pack<VEC>(y + t * h + column, sum);
  }
}

struct alignas(8) Entry {
  int row, token;
};

// What is sorted: the pairs of the pass before, or at first tokens, of which those that count nowhere have
// the row behind the last.
struct Unsorted {
  const Entry* entries;
  Index index;
  int64_t skip;

  __device__ Entry at(int64_t i) const {
    if (entries) return entries[i];
    const int64_t row = index.at(i);
    return {static_cast<int>(index.has(row) && row != skip ? row : index.rows), static_cast<int>(i)};
  }
};

// Which bits of the row are sorted by, and how the places are shared out among blocks.
struct Pass {
  int shift, radix, chunks;  // a tile is so many chunks
  int64_t places;

  __device__ int digit(Entry e) const { return e.row >> shift & (radix - 1); }
  __device__ int64_t tile_begin(int64_t tile) const { return tile * chunks * kChunk; }
};

// counts (tiles, radix): the places of each digit in each tile.
__global__ void __launch_bounds__(kSortThreads) count_kernel(Unsorted source, Pass pass, int* counts) {
  __shared__ int seen[kRadix];
  for (int d = threadIdx.x; d < pass.radix; d += kSortThreads) seen[d] = 0;
  __syncthreads();
  const int64_t next = pass.tile_begin(blockIdx.x + 1), end = next < pass.places ? next : pass.places;
  for (int64_t i = pass.tile_begin(blockIdx.x) + threadIdx.x; i < end; i += kSortThreads)
    atomicAdd(&seen[pass.digit(source.at(i))], 1);
  __syncthreads();
  for (int d = threadIdx.x; d < pass.radix; d += kSortThreads)
    counts[blockIdx.x * pass.radix + d] = seen[d];
}

// Counts become the first place of each digit of each tile, digits before tiles. One block, a thread a digit.
__global__ void __launch_bounds__(kRadix) scan_kernel(int* counts, int tiles, int radix) {
  const int digit = threadIdx.x, lane = digit % 32;
  int total = 0;
  if (digit < radix) {
#pragma unroll 8
    for (int tile = 0; tile < tiles; ++tile) total += counts[tile * radix + digit];
  }
  int sum = total;  // of this digit and those before it in the warp
  for (int s = 1; s < 32; s *= 2) {
    const int before = __shfl_sync(0xffffffffu, sum, lane >= s ? lane - s : lane);
    if (lane >= s) sum += before;
  }
  __shared__ int warps[kRadix / 32];
  if (lane == 31) warps[digit / 32] = sum;
  __syncthreads();
  if (digit >= radix) return;
  int place = sum - total;
  for (int w = 0; w < digit / 32; ++w) place += warps[w];
#pragma unroll 8
  for (int tile = 0; tile < tiles; ++tile) {
    const int count = counts[tile * radix + digit];
    counts[tile * radix + digit] = place;
    place += count;
  }
}

// Each pair to its place: behind those of its digit that come before it in its warp, in the warps before, and
// in the chunks and tiles before.
__global__ void __launch_bounds__(kSortThreads)
    scatter_kernel(Unsorted source, Pass pass, const int* starts, Entry* sorted) {
  __shared__ int next[kRadix], seen[kSortWarps][kRadix];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = threadIdx.x; d < pass.radix; d += kSortThreads)
    next[d] = starts[blockIdx.x * pass.radix + d];
  for (int chunk = 0; chunk < pass.chunks; ++chunk) {
    const int64_t first =
        pass.tile_begin(blockIdx.x) + static_cast<int64_t>(chunk) * kChunk + warp * (32 * kRounds) + lane;
    for (int d = threadIdx.x; d < pass.radix; d += kSortThreads)
      for (int w = 0; w < kSortWarps; ++w) seen[w][d] = 0;
    __syncthreads();
    Entry entries[kRounds];
    int ranks[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const bool there = first + r * 32 < pass.places;
      entries[r] = there ? source.at(first + r * 32) : Entry{};
      const int digit = there ? pass.digit(entries[r]) : -1;
      const unsigned same = __match_any_sync(0xffffffffu, digit);
      const int before = __popc(same & ((1u << lane) - 1));
      if (there) ranks[r] = seen[warp][digit] + before;
      __syncwarp();
      if (there && before == 0) seen[warp][digit] += __popc(same);
      __syncwarp();
    }
    __syncthreads();
    for (int d = threadIdx.x; d < pass.radix; d += kSortThreads) {
      int place = next[d];
      for (int w = 0; w < kSortWarps; ++w) {
        const int count = seen[w][d];
        seen[w][d] = place;
        place += count;
      }
      next[d] = place;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
      if (first + r * 32 < pass.places) sorted[seen[warp][pass.digit(entries[r])] + ranks[r]] = entries[r];
    __syncthreads();  // so that the next chunk may clear the counts
  }
}

// Tokens in the order of their rows: sorted, or the rows being counted, row by row through the sequences.
struct Order {
  const Entry* entries;
  int places, rows, period;  // row `rows`: counts nowhere

  __device__ Entry at(int i) const {
    if (entries) return entries[i];
    const int sequences = places / period;
    return {i / sequences, i % sequences * period + i / sequences};
  }
};

template <int VEC, class G> __device__ inline void add_to(G* p, const float (&sum)[VEC]) {
  float old[VEC];
  load_pack<VEC>(p, old);
#pragma unroll
  for (int j = 0; j < VEC; ++j) old[j] += sum[j];
  store_pack<VEC>(p, old);
}

// A warp has a piece, of a multiple of 32 places, and a stripe of columns (blockIdx.y). partials (pieces, 2,
// h): of the run that entered the piece, and of the one that began in it and goes on behind it.
template <class T, class G, int VEC>
__global__ void __launch_bounds__(32 * kWarpsPerBlock)
    sum_kernel(const T* dy, Order order, G* total, float* partials, int piece, int64_t h) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * 32 + threadIdx.x) * VEC;
  if (at * piece >= order.places || column >= h) return;
  const int first = static_cast<int>(at * piece), left = order.places - first;
  const int end = first + (left < piece ? left : piece);

  float sum[VEC] = {};
  bool entered = first > 0 && order.at(first - 1).row == order.at(first).row;
  for (int i = first; i < end; i += kAhead) {
    Entry entries[kAhead + 1];  // -1 behind the last place
#pragma unroll
    for (int a = 0; a <= kAhead; ++a) entries[a] = i + a < order.places ? order.at(i + a) : Entry{-1, 0};
    Pack<T, VEC> ahead[kAhead] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (entries[a].row >= 0 && entries[a].row < order.rows)
        ahead[a] = *reinterpret_cast<const Pack<T, VEC>*>(dy + entries[a].token * h + column);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int row = entries[a].row;
      if (row < 0 || row == order.rows) return;  // nothing behind counts
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] += to_f32(ahead[a].v[j]);
      const bool open = entries[a + 1].row == row;
      if (open && i + a + 1 < end) continue;
      if (open || entered) store_pack<VEC>(partials + (2 * at + !entered) * h + column, sum);
      else add_to<VEC>(total + row * h + column, sum);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] = 0.0f;
      entered = false;
    }
  }
}

// The run that begins in a piece and goes on behind it, if there is one: its partial sums in the order of
// pieces, a contiguous share of them for each warp.
template <class G, int VEC>
__global__ void __launch_bounds__(32 * kJoinWarps)
    join_kernel(Order order, G* total, float* partials, int piece, int64_t h) {
  const int began = blockIdx.x, first = began * piece, warp = threadIdx.y;
  const int row = order.at(first + piece - 1).row;
  const bool open = order.at(first + piece).row == row, entered = first > 0 && order.at(first - 1).row == row;
  if (!open || entered || row == order.rows) return;
  int last = began + 1, beyond = (order.places - 1) / piece + 1;  // the run reaches `last` and not `beyond`
  while (beyond - last > 1) {
    const int middle = last + (beyond - last) / 2;
    if (order.at(middle * piece).row == row) last = middle;
    else beyond = middle;
  }
  const int count = last - began, share = (count + kJoinWarps - 1) / kJoinWarps;
  const int from = began + 1 + warp * share, to = from + share < beyond ? from + share : beyond;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * 32 + threadIdx.x) * VEC;
  const bool mine = column < h;

  __shared__ float shares[kJoinWarps][VEC][32];
  float sum[VEC] = {};
  if (mine && warp == 0) load_pack<VEC>(partials + (2 * began + 1) * h + column, sum);
  if (mine) {
#pragma unroll 8
    for (int64_t at = from; at < to; ++at) {
      float part[VEC];
      load_pack<VEC>(partials + 2 * at * h + column, part);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] += part[j];
    }
  }
#pragma unroll
  for (int j = 0; j < VEC; ++j) shares[warp][j][threadIdx.x] = sum[j];
  __syncthreads();
  if (warp != 0 || !mine) return;
  for (int w = 1; w < kJoinWarps; ++w) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[j] += shares[w][j][threadIdx.x];
  }
  add_to<VEC>(total + row * h + column, sum);
}

// --- on the host

unsigned blocks_for(int64_t items, int64_t per_block, const char* what) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  require(blocks <= INT_MAX, "too many ", what, " for one launch: ", items);
  return static_cast<unsigned>(blocks);
}

unsigned stripes_for(int64_t h, int64_t width) {
  const int64_t stripes = (h + width - 1) / width;
  require(stripes <= 65535, "weight has too many columns for one launch: ", h);
  return static_cast<unsigned>(stripes);
}

// Places in a piece: the power of two, at least a warp, that makes about sqrt(8 places) pieces.
int64_t piece_size(int64_t places) {
  int64_t piece = 32;
  while (piece * piece * 8 < places) piece *= 2;
  return piece;
}

// How a table of so many rows is sorted: passes of about equally many bits, tiles of equally many chunks.
struct Sorting {
  Sorting(int64_t places, int64_t rows) {
    int bits = 1;
    while (rows >> bits) ++bits;  // of the row behind the last too
    passes = (bits + kDigitBits - 1) / kDigitBits;
    digit_bits = (bits + passes - 1) / passes;
    const int64_t all = (places + kChunk - 1) / kChunk;
    chunks = (all + kTiles - 1) / kTiles;
    tiles = chunks > 0 ? (all + chunks - 1) / chunks : 0;
  }
  int passes, digit_bits;
  int64_t chunks, tiles;
};

// The workspace for one table's gradient: partial sums, pairs before and after a pass, counts.
struct Room {
  Room(char* data, int64_t places, int64_t rows, int64_t h, bool sorts) {
    const int64_t pieces = (places + piece_size(places) - 1) / piece_size(places);
    partials = reinterpret_cast<float*>(data);
    entries[0] = reinterpret_cast<Entry*>(partials + 2 * pieces * h);
    entries[1] = entries[0] + (sorts ? places : 0);
    counts = reinterpret_cast<int*>(entries[1] + (sorts ? places : 0));
    bytes = reinterpret_cast<char*>(counts + (sorts ? Sorting(places, rows).tiles * kRadix : 0)) - data;
  }
  float* partials;
  Entry* entries[2];
  int* counts;
  int64_t bytes;
};

// The pairs of an index in order; they lie in `room`.
const Entry* sort(const Index& index, int64_t skip, int64_t places, const Room& room, cudaStream_t stream) {
  const Sorting sorting(places, index.rows);
  const unsigned tiles = static_cast<unsigned>(sorting.tiles);
  Unsorted source{nullptr, index, skip};
  for (int i = 0; i < sorting.passes; ++i) {
    const Pass pass{i * sorting.digit_bits, 1 << sorting.digit_bits, static_cast<int>(sorting.chunks),
                    places};
    count_kernel<<<tiles, kSortThreads, 0, stream>>>(source, pass, room.counts);
    check_launch("embedding_backward (count)");
    scan_kernel<<<1, kRadix, 0, stream>>>(room.counts, static_cast<int>(tiles), pass.radix);
    check_launch("embedding_backward (scan)");
    scatter_kernel<<<tiles, kSortThreads, 0, stream>>>(source, pass, room.counts, room.entries[i % 2]);
    check_launch("embedding_backward (scatter)");
    source.entries = room.entries[i % 2];
  }
  return source.entries;
}

template <class T, class G, int VEC>
void add_sums(const T* dy, const Order& order, G* total, const Room& room, int64_t h, cudaStream_t stream) {
  constexpr int JOIN = VEC < 4 ? VEC : 4;
  const int64_t piece = piece_size(order.places), pieces = (order.places + piece - 1) / piece;
  const dim3 grid(blocks_for(pieces, kWarpsPerBlock, "tokens"), stripes_for(h, 32 * VEC));
  sum_kernel<T, G, VEC><<<grid, dim3(32, kWarpsPerBlock), 0, stream>>>(dy, order, total, room.partials,
                                                                       static_cast<int>(piece), h);
  check_launch("embedding_backward (sums)");
  if (pieces == 1) return;
  const dim3 joins(static_cast<unsigned>(pieces - 1), stripes_for(h, 32 * JOIN));
  join_kernel<G, JOIN><<<joins, dim3(32, kJoinWarps), 0, stream>>>(order, total, room.partials,
                                                                   static_cast<int>(piece), h);
  check_launch("embedding_backward (join)");
}

// gradient[index[t]] += dy[t] for every token but those of row `skip`; float32 or of dy's dtype, rounded
// once: no element is added to twice.
template <class T>
void add_by_row(const Tensor& dy, const Index& index, int64_t skip, const Tensor& gradient, int64_t places,
                const Tensor& workspace, cudaStream_t stream) {
  const int64_t h = gradient.size(1);
  const Room room(static_cast<char*>(workspace.data), places, index.rows, h, index.given());
  require(workspace.numel() >= room.bytes, "workspace must have ", room.bytes, " bytes, got ",
          workspace.numel());
  const Order order{index.given() ? sort(index, skip, places, room, stream) : nullptr,
                    static_cast<int>(places), static_cast<int>(index.rows), static_cast<int>(index.period)};
  constexpr int VEC = 16 / sizeof(T);
  const bool packs =
      h % VEC == 0 && aligned16(dy.data) && aligned16(gradient.data) && aligned16(workspace.data);
  const auto add = [&](auto* total) {
    using G = std::remove_pointer_t<decltype(total)>;
    if (packs) add_sums<T, G, VEC>(dy.as<T>(), order, total, room, h, stream);
    else add_sums<T, G, 1>(dy.as<T>(), order, total, room, h, stream);
  };
  if (gradient.is<float>()) add(gradient.as<float>());
  else add(gradient.as<T>());
}

int64_t sequence_length(const Tensor& ids) { return ids.ndim > 0 ? ids.size(-1) : 1; }

void check_columns(const Tensor& table, const char* what, int64_t h) {
  require(!table.defined() || (table.ndim == 2 && table.size(1) == h), what,
          " must have two dimensions and ", h, " columns");
}

}  // namespace

// ids (..., s) int64 or int32; weight (v, h) float32, float16 or bfloat16; positions like ids, or None for 0,
// 1, 2, ...; segments like ids, or None for 0; position_weight (p, h) and segment_weight (g, h) of weight's
// dtype or None; y (..., s, h). All contiguous.
void embedding_forward(Tensor ids, Tensor weight, Tensor positions, Tensor position_weight, Tensor segments,
                       Tensor segment_weight, std::optional<int64_t> /*padding_idx*/, Tensor y,
                       int64_t stream) {
  require(weight.ndim == 2, "weight must have two dimensions");
  const int64_t tokens = ids.numel(), h = weight.size(1);
  check_columns(position_weight, "position_weight", h);
  check_columns(segment_weight, "segment_weight", h);
  require(y.numel() == tokens * h, "y must have ", tokens * h, " elements, got ", y.numel());
  if (y.numel() == 0) return;
  for_dtype(weight, "weight", [&](auto element) {
    using T = decltype(element);
    const auto table = [&](const Tensor& data, const Tensor& index, const char* what, int64_t period) {
      const int64_t rows = data.defined() ? data.size(0) : period;
      return Table<T>{data.as<T>(), Index(index, what, tokens, rows, period)};
    };
    constexpr int VEC = 16 / sizeof(T);
    const bool packs = h % VEC == 0 && aligned16(weight.data) && aligned16(position_weight.data) &&
                       aligned16(segment_weight.data) && aligned16(y.data);
    auto* kernel = packs ? &forward_kernel<T, VEC> : &forward_kernel<T, 1>;
    kernel<<<blocks_for(tokens, kWarpsPerBlock, "tokens"), dim3(32, kWarpsPerBlock), 0, as_stream(stream)>>>(
        table(weight, ids, "ids", 1), table(position_weight, positions, "positions", sequence_length(ids)),
        table(segment_weight, segments, "segments", 1), y.as<T>(), tokens, h);
    check_launch("embedding_forward");
  });
}
FASTLM_EXPORT(embedding_forward);

// Bytes of workspace for embedding_backward with these arguments: the gradients take turns.
int64_t embedding_backward_workspace(Tensor /*dy*/, Tensor ids, Tensor /*weight*/, Tensor positions,
                                     Tensor /*position_weight*/, Tensor segments, Tensor /*segment_weight*/,
                                     std::optional<int64_t> /*padding_idx*/, Tensor dweight, Tensor dposition,
                                     Tensor dsegment) {
  int64_t most = 0;
  const auto count = [&](const Tensor& gradient, bool sorts) {
    if (gradient.numel() == 0 || ids.numel() == 0) return;
    const int64_t bytes = Room(nullptr, ids.numel(), gradient.size(0), gradient.size(1), sorts).bytes;
    most = bytes > most ? bytes : most;
  };
  count(dweight, true);
  count(dposition, positions.defined());
  count(dsegment, segments.defined());
  return most;
}
FASTLM_EXPORT(embedding_backward_workspace);

// dy (..., s, h) of weight's dtype; dweight (v, h), dposition (p, h), dsegment (g, h), float32 or of dy's
// dtype, added to; row padding_idx of dweight is left alone. None is not computed. workspace as many bytes as
// embedding_backward_workspace says.
void embedding_backward(Tensor dy, Tensor ids, Tensor weight, Tensor positions, Tensor /*position_weight*/,
                        Tensor segments, Tensor /*segment_weight*/, std::optional<int64_t> padding_idx,
                        Tensor dweight, Tensor dposition, Tensor dsegment, Tensor workspace, int64_t stream) {
  require(weight.ndim == 2, "weight must have two dimensions");
  const int64_t tokens = ids.numel(), h = weight.size(1);
  require(dy.numel() == tokens * h, "dy must have ", tokens * h, " elements, got ", dy.numel());
  require(tokens <= INT_MAX - kTiles * kChunk, "too many tokens to sort: ", tokens);
  if (dy.numel() == 0) return;
  for_dtype(dy, "dy", [&](auto element) {
    const auto add = [&](const Tensor& gradient, const Tensor& index, const char* what, int64_t period,
                         int64_t skip) {
      if (gradient.numel() == 0) return;
      check_columns(gradient, what, h);
      require(gradient.size(0) < INT_MAX, what, " has too many rows to sort: ", gradient.size(0));
      add_by_row<decltype(element)>(dy, Index(index, what, tokens, gradient.size(0), period), skip, gradient,
                                    tokens, workspace, as_stream(stream));
    };
    add(dweight, ids, "the gradient of weight", 1, padding_idx.value_or(-1));
    add(dposition, positions, "the gradient of position_weight", sequence_length(ids), -1);
    add(dsegment, segments, "the gradient of segment_weight", 1, -1);
  });
}
FASTLM_EXPORT(embedding_backward);

}  // namespace fastlm
