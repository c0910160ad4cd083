// Attention of N new positions over a cache, with the writes of their keys and values.
//
// Block (split, tile, pair): 16 query rows (row = i * group + query head of the group) of one key
// head of one batch row. Splits from 1 on divide the keys that were there before; split 0 has the
// new ones, which it takes from `qkv`, so that nobody reads what this launch writes. With EVA the
// old keys are ring rows and summaries, and split 0, which has most to do, makes the new summaries. A warp
// takes 16 keys at a time; parts meet first in shared memory, then, in the last block, in scratch.
#pragma once
#include "fragments.cuh"
#include "softmax.cuh"

namespace pcc {

template <typename C> struct attend_args {
  using T = typename C::T;
  const float *qkv, *cos, *sin;
  const long long* start;
  T *key, *value, *summary_key, *summary_value;
  const float *mu, *phi;
  T* y;
  float* partial;
  u32* done;
};

template <typename C> struct Attend {
  using T = typename C::T;
  static constexpr int D = C::D, N = C::N, G = C::H / C::HK, WARPS = 4, STAGES = 2;
  static constexpr int QUERY = 16 * D * 2, BLOCK = 16 * D * 2;  // bytes of 16 rows
  static constexpr int NEW = (N + 15) / 16, POOLS = (C::CHUNKS + 15) / 16;
  static constexpr int TOUCHED = C::CHUNKS * (C::EVA ? C::CHUNK : 0);  // rows of their chunks
  static constexpr int RING = WARPS * STAGES * 2, HELD = (NEW + POOLS + (TOUCHED + 15) / 16) * 2;  // blocks
  static constexpr int BLOCKS = RING > HELD ? RING : HELD, AREA = BLOCKS * BLOCK;
  static constexpr int LINE = Softmax<C>::LINE, WIDTH = (C::H + 2 * C::HK) * D, PARTS = C::SPLITS + 1;

  const attend_args<C>& a;
  char* shared;
  u32 base, area;
  int warp, lane, b, h, tile, start, first, last;  // first, last: query positions of the tile

  __device__ __forceinline__ Attend(const attend_args<C>& a_, char* shared_)
      : a(a_), shared(shared_), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    base = shared_address(shared), area = base + QUERY;
    tile = blockIdx.y, b = int(blockIdx.z) / C::HK, h = int(blockIdx.z) % C::HK;
    long long at = __ldcg(a.start + b);
    long long most = C::EVA ? (1 << 30) : C::ROWS;
    start = int(at < 0 ? 0 : at < most ? at : most);
    first = tile * 16 / G, last = (tile * 16 + 15) / G;
    if (last > N - 1) last = N - 1;
  }

  // ---- what a query may read: positions from `least` on, summaries below `past`

  __device__ __forceinline__ int least(int i) const {
    if constexpr (C::EVA) return (start + i) / C::WINDOW * C::WINDOW;
    int from = start + i - C::WINDOW + 1;
    return C::WINDOW > 0 && from > 0 ? from : 0;
  }
  __device__ __forceinline__ int past(int i) const { return least(i) / C::CHUNK; }

  __device__ __forceinline__ int slot(int position) const {
    return C::EVA ? position % C::ROWS : position;
  }
  __device__ __forceinline__ size_t cache(int rows, int row) const {
    return ((size_t(b) * C::HK + h) * rows + row) * D;
  }
  __device__ __forceinline__ const float* input(int n, int head) const {
    return a.qkv + (size_t(b) * N + n) * WIDTH + head * D;
  }

  // Columns of one head go through the rotation by units of V: UNITS of them make a row.
  static constexpr int V = C::R % 4 == 0 ? 4 : 1, TURNS = C::R / V;
  static constexpr int UNITS = TURNS + (D - 2 * C::R) / V;

  struct Unit {
    float low[V], high[V], cos[V], sin[V];
  };

  __device__ __forceinline__ static void read(float (&to)[V], const float* from) {
    if constexpr (V == 4)
      *reinterpret_cast<float4*>(to) = __ldcg(reinterpret_cast<const float4*>(from));
    else
      to[0] = __ldcg(from);
  }

  __device__ __forceinline__ Unit load(const float* x, int n, int u) const {
    Unit v = {};
    if (u < TURNS) {
      const size_t at = size_t(start + n < C::P ? start + n : C::P - 1) * C::R + u * V;
      read(v.low, x + u * V), read(v.high, x + u * V + C::R);
      read(v.cos, a.cos + at), read(v.sin, a.sin + at);
    } else {
      read(v.low, x + 2 * C::R + (u - TURNS) * V);
    }
    return v;
  }

  // Hand what unit u becomes to `sink(d, values of columns d..d+V-1)`.
  template <typename Sink>
  __device__ __forceinline__ static void turn(const Unit& v, int u, Sink sink) {
    struct alignas(V * sizeof(T)) { T each[V]; } low, high;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      bool on = u < TURNS;
      low.each[j] = Half<T>::round(on ? v.low[j] * v.cos[j] - v.high[j] * v.sin[j] : v.low[j]);
      high.each[j] = Half<T>::round(v.high[j] * v.cos[j] + v.low[j] * v.sin[j]);
    }
    sink(u < TURNS ? u * V : 2 * C::R + (u - TURNS) * V, low);
    if (u < TURNS) sink(u * V + C::R, high);
  }

  __device__ __forceinline__ T* held(int block, int row, int d) const {
    return reinterpret_cast<T*>(shared + QUERY + block * BLOCK + place<D>(row, d / 8)) + d % 8;
  }

  template <typename Group> __device__ __forceinline__ static void write(T* to, Group v) {
    *reinterpret_cast<Group*>(to) = v;
  }

  // By `COUNT` threads from FROM on, all loads of a thread first.
  template <int FROM, int COUNT> __device__ __forceinline__ void stage_queries() const {
#pragma unroll 4
    for (int e = threadIdx.x - FROM; e < 16 * UNITS; e += COUNT) {
      const int row = e / UNITS, u = e % UNITS, at = tile * 16 + row, i = at / G;
      Unit v = {};
      if (i < N) v = load(input(i, h * G + at % G), i, u);
      turn(v, u, [&](int d, auto group) {
        write(reinterpret_cast<T*>(shared + place<D>(row, d / 8)) + d % 8, group);
      });
    }
  }

  // ---- old keys: a warp's ring of two blocks of 16 keys and values

  struct Old {
    int from, positions, older, blocks, ring_blocks;
  };

  __device__ __forceinline__ Old old_keys() const {
    Old o;
    o.from = least(first);
    o.positions = start > o.from ? start - o.from : 0;
    o.older = 0;
    if (C::EVA) {
      o.older = min(min(past(last), start / C::CHUNK), C::OLDER);
    }
    o.ring_blocks = (o.positions + 15) / 16;
    o.blocks = o.ring_blocks + (o.older + 15) / 16;
    return o;
  }

  // Begin to fetch block t of the old keys: lanes take 16 bytes each, rows apart by STEP.
  __device__ __forceinline__ void fetch(const Old& o, int t, int stage) const {
    constexpr int GROUPS = D / 8;
    if (t < o.blocks) {
      const bool ring = t < o.ring_blocks;
      const size_t offset = cache(ring ? C::ROWS : C::OLDER, 0);
      const T* key = (ring ? a.key : a.summary_key) + offset;
      const T* value = (ring ? a.value : a.summary_value) + offset;
      const int first = (ring ? t : t - o.ring_blocks) * 16, rows = ring ? C::ROWS : C::OLDER;
      const int valid = (ring ? o.positions : o.older) - first;
      const int line0 = ring ? slot(o.from + first) : first;
      const u32 to = area + (warp * STAGES + stage) * 2 * BLOCK;
#pragma unroll
      for (int i = 0; i < (16 * GROUPS + 31) / 32; ++i) {
        const int e = lane + 32 * i, row = e / GROUPS, c = e % GROUPS;
        if (16 * GROUPS % 32 && row >= 16) break;
        int line = line0 + row;
        line = row >= valid ? 0 : line < rows ? line : C::ROWS < 16 ? line % rows : line - rows;
        const u32 size = row < valid ? 16 : 0, at = place<D>(row, c);
        copy_async(to + at, key + line * D + c * 8, size);
        copy_async(to + BLOCK + at, value + line * D + c * 8, size);
      }
    }
    commit_copies();
  }

  // The query position of this lane's row r.
  __device__ __forceinline__ int query(int r) const {
    return min((tile * 16 + lane / 4 + 8 * r) / G, N - 1);
  }

  __device__ __forceinline__ void attend_old(Softmax<C>& s) const {
    const Old o = old_keys();
    const int step = C::SPLITS * WARPS;
    int t = (int(blockIdx.x) - 1) * WARPS + warp;
    for (int k = 0; k < STAGES; ++k) fetch(o, t + k * step, k);
    int from[2], past_[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      from[r] = least(query(r)) - o.from;
      past_[r] = min(o.older, past(query(r)));
    }
    wait_for_launches();
    stage_queries<0, 32 * WARPS>();
    __syncthreads();
    for (int stage = 0; t < o.blocks; t += step, stage ^= 1) {
      wait_copies<STAGES - 1>();
      __syncwarp();
      const bool ring = t < o.ring_blocks;
      const int key0 = ring ? t * 16 : (t - o.ring_blocks) * 16;
      const int low[2] = {ring ? from[0] - key0 : 0, ring ? from[1] - key0 : 0};
      const int high[2] = {(ring ? o.positions : past_[0]) - key0,
                           (ring ? o.positions : past_[1]) - key0};
      u32 at = area + (warp * STAGES + stage) * 2 * BLOCK;
      s.add(base, at, at + BLOCK, lane, low, high);
      __syncwarp();
      fetch(o, t + STAGES * step, stage);
    }
    wait_copies<0>();
  }

  // ---- new keys

  template <int FROM, int COUNT> __device__ __forceinline__ void stage_new() const {
#pragma unroll 4
    for (int e = threadIdx.x - FROM; e < NEW * 16 * UNITS; e += COUNT) {
      const int n = e / UNITS, u = e % UNITS, line = slot(start + n);
      const bool kept = tile == 0 && n < N && line < C::ROWS;
      Unit key = {}, value = {};
      if (n < N) {
        key = load(input(n, C::H + h), n, u);
        read(value.low, input(n, C::H + C::HK + h) + (u < TURNS ? u : u + TURNS) * V);
        if (u < TURNS) read(value.high, input(n, C::H + C::HK + h) + (u + TURNS) * V);
      }
      turn(key, u, [&](int d, auto group) {
        write(held(n / 16 * 2, n % 16, d), group);
        if (kept) write(a.key + cache(C::ROWS, line) + d, group);
      });
#pragma unroll
      for (int j = 0; j < V; ++j) value.cos[j] = 1;  // values are not turned
      turn(value, u, [&](int d, auto group) {
        write(held(n / 16 * 2 + 1, n % 16, d), group);
        if (kept) write(a.value + cache(C::ROWS, line) + d, group);
      });
    }
  }

  // Which of the new rows the ring's row of `position` becomes; none from N on.
  __device__ __forceinline__ int renewed(int position) const {
    return (position - start + C::ROWS) % C::ROWS;
  }

  // mu and phi of this head, f32 [2][D], behind everything else.
  __device__ __forceinline__ const float* target(int which) const {
    return reinterpret_cast<const float*>(shared + QUERY + AREA + WARPS * 16 * 8) + which * D;
  }

  // Begin to fetch the rows of the chunks touched, but for those that are new, and mu and phi.
  __device__ __forceinline__ void fetch_chunks() const {
    for (int e = threadIdx.x; e < D / 2; e += 32 * WARPS) {
      const int which = e / (D / 4), d = e % (D / 4) * 4;
      copy_async(shared_address(target(which) + d), (which ? a.phi : a.mu) + h * D + d, 16);
    }
    const int from = start / C::CHUNK * C::CHUNK;
    for (int e = threadIdx.x; e < TOUCHED * (D / 8); e += 32 * WARPS) {
      const int row = e / (D / 8), c = e % (D / 8), block = (NEW + POOLS + row / 16) * 2;
      if (renewed(from + row) < N) continue;
      const size_t offset = cache(C::ROWS, slot(from + row)) + c * 8;
      const u32 to = area + block * BLOCK + place<D>(row % 16, c);
      copy_async(to, a.key + offset, 16);
      copy_async(to + BLOCK, a.value + offset, 16);
    }
    commit_copies();
  }

  // Where row m of touched chunk c lies: block of its keys (the values are in the next), line.
  __device__ __forceinline__ void find(int c, int m, int& block, int& line) const {
    const int n = renewed((start / C::CHUNK + c) * C::CHUNK + m), row = c * C::CHUNK + m;
    block = n < N ? n / 16 * 2 : (NEW + POOLS + row / 16) * 2;
    line = n < N ? n % 16 : row % 16;
  }

  // Lanes share the rows of a chunk: SHARE of them read one row, 16 bytes of it in turn.
  static constexpr int SHARE = C::CHUNK > 16 ? 1 : C::CHUNK > 8 ? 2 : C::CHUNK > 4 ? 4 : 8;

  // This lane's row's share of the chunk: softmax over its rows m of mu . k_m, or of
  // (phi - k_m / (2 sqrt hd)) . k_m.
  __device__ __forceinline__ float shares(int c, int which) const {
    const float half = 0.5f * rsqrtf(float(D));
    const int m = lane / SHARE;
    float score = 0;
    if (m < C::CHUNK) {
      int block, line;
      find(c, m, block, line);
#pragma unroll
      for (int g = lane % SHARE; g < D / 8; g += SHARE) {
        uint4 raw = *reinterpret_cast<const uint4*>(held(block, line, g * 8));
        float want[8];
        const float4* from = reinterpret_cast<const float4*>(target(which) + g * 8);
        *reinterpret_cast<float4*>(want) = from[0], *reinterpret_cast<float4*>(want + 4) = from[1];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float k = Half<T>::wide(reinterpret_cast<const T*>(&raw)[j]);
          score += which ? (want[j] - k * half) * k : want[j] * k;
        }
      }
    }
#pragma unroll
    for (int k = 1; k < SHARE; k <<= 1) score += __shfl_xor_sync(~0u, score, k);
    const float top = warp_max(m < C::CHUNK ? score : -INFINITY);
    const float weight = m < C::CHUNK ? expf(score - top) : 0.0f;
    return weight / (warp_sum(weight) / SHARE);
  }

  // Summary c of the chunks touched, its key (which = 0) or its value (1); by one warp.
  __device__ __forceinline__ void pool(int c, int which) const {
    constexpr int EACH = (D + 31) / 32;
    const float share = shares(c, which);
    int mine = 0, line = 0;
    if (lane < C::CHUNK) find(c, lane, mine, line);
    mine = mine * 16 + line;
    float sum[EACH] = {};
#pragma unroll
    for (int m = 0; m < C::CHUNK; ++m) {
      const float w = __shfl_sync(~0u, share, m * SHARE);
      const int at = __shfl_sync(~0u, mine, m);
#pragma unroll
      for (int j = 0; j < EACH; ++j)
        if (lane + 32 * j < D)
          sum[j] += w * Half<T>::wide(*held(at / 16 + which, at % 16, lane + 32 * j));
    }
    const int chunk = start / C::CHUNK + c;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int d = lane + 32 * j;
      if (d >= D) continue;
      const T v = Half<T>::round(sum[j]);
      *held((NEW + c / 16) * 2 + which, c % 16, d) = v;
      T* to = which ? a.summary_value : a.summary_key;
      if (tile == 0 && chunk < C::OLDER) to[cache(C::OLDER, chunk) + d] = v;
    }
  }

  __device__ __forceinline__ void attend_new(Softmax<C>& s) const {
    if constexpr (C::EVA) fetch_chunks();
    wait_for_launches();
    if (NEW > 1) {
      stage_queries<0, 32 * WARPS>();
      stage_new<0, 32 * WARPS>();
    } else if (warp < WARPS / 2) {
      stage_queries<0, 16 * WARPS>();
    } else {
      stage_new<16 * WARPS, 16 * WARPS>();
    }
    if constexpr (C::EVA) {
      for (int e = threadIdx.x; e < POOLS * 32 * D; e += 32 * WARPS)
        *held(NEW * 2 + e / (16 * D), e / D % 16, e % D) = Half<T>::round(0);
      wait_copies<0>();
      __syncthreads();
      for (int task = warp; task < 2 * C::CHUNKS; task += WARPS) pool(task / 2, task % 2);
    }
    __syncthreads();
    for (int t = warp; t < NEW + POOLS; t += WARPS) {
      u32 at = area + t * 2 * BLOCK;
      int low[2], high[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = query(r);
        low[r] = t < NEW ? least(i) - start - t * 16 : 0;
        high[r] = t < NEW ? i + 1 - t * 16
                          : min(C::CHUNKS, past(i) - start / C::CHUNK) - (t - NEW) * 16;
      }
      s.add(base, at, at + BLOCK, lane, low, high);
    }
  }

  // ---- parts together: in shared memory across a cluster; before sm_90, in scratch

  __device__ __forceinline__ float* saved() const {  // [WARPS][16][LINE]
    return reinterpret_cast<float*>(shared + QUERY);
  }
  __device__ __forceinline__ float* heads() const {  // [WARPS][16][2]
    return reinterpret_cast<float*>(shared + QUERY + AREA);
  }

  __device__ __forceinline__ T* result(int row) const {
    const int at = tile * 16 + row;
    return a.y + ((size_t(b) * N + at / G) * C::H + h * G + at % G) * D;
  }

  // Add the parts of this block's warps: the first warp's rows become the sums.
  __device__ __forceinline__ void merge_warps(float2* merged) const {
    for (int e = threadIdx.x * 4; e < 16 * D; e += 128 * WARPS) {
      const int row = e / D, at = row * LINE + e % D;
      float2 head[WARPS];
      float most = -INFINITY, weight = 0;
#pragma unroll
      for (int k = 0; k < WARPS; ++k) {
        head[k] = *reinterpret_cast<const float2*>(heads() + (k * 16 + row) * 2);
        most = fmaxf(most, head[k].x);
      }
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int k = 0; k < WARPS; ++k) {
        const float f = most == -INFINITY ? 0.0f : exp2f(head[k].x - most);
        const float4 v = *reinterpret_cast<const float4*>(saved() + k * 16 * LINE + at);
        weight += f * head[k].y;
        sum.x += f * v.x, sum.y += f * v.y, sum.z += f * v.z, sum.w += f * v.w;
      }
      *reinterpret_cast<float4*>(saved() + at) = sum;
      if (e % D == 0) merged[row] = make_float2(most, weight);
    }
  }

  // Each block of the cluster adds the blocks' parts of some rows, a lane for each part's head.
  __device__ __forceinline__ void finish_cluster() const {
    constexpr int EACH = 16 / PARTS;
    __shared__ float2 merged[16];
    merge_warps(merged);
    const int rank = cluster_rank();
    meet_cluster();
    for (int row = rank * EACH + warp / 2; row < (rank + 1) * EACH; row += WARPS / 2) {
      float2 head = make_float2(-INFINITY, 0);
      if (lane < PARTS) head = read_cluster(&merged[row].x, lane);
      const float most = warp_max(head.x);
      const float factor = head.x == -INFINITY ? 0.0f : exp2f(head.x - most);
      const float scale = 1.0f / warp_sum(factor * head.y);
      for (int c0 = warp % 2 * 64; c0 < D; c0 += 128) {
        const int c = c0 + lane * 2;
        float2 v[PARTS], sum = make_float2(0, 0);
#pragma unroll
        for (int k = 0; k < PARTS; ++k)
          v[k] = read_cluster(saved() + row * LINE + (c < D ? c : 0), k);
#pragma unroll
        for (int k = 0; k < PARTS; ++k) {
          const float f = __shfl_sync(~0u, factor, k);
          sum.x += f * v[k].x, sum.y += f * v[k].y;
        }
        if (c < D && tile * 16 + row < N * G)
          *reinterpret_cast<u32*>(result(row) + c) = pair<T>(sum.x * scale, sum.y * scale);
      }
    }
    meet_cluster();  // nobody leaves while its memory is read
  }

  __device__ __forceinline__ float* part(int split) const {
    const size_t pair = size_t(blockIdx.z) * C::TILES + tile;
    return a.partial + (pair * PARTS + split) * 16 * (D + 2);
  }

  // Whether this block is the last of its pair to have written its part.
  __device__ __forceinline__ bool is_last() const {
    __shared__ bool is;
    u32* done = a.done + int(blockIdx.z) * C::TILES + tile;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      is = atomicAdd(done, 1u) == C::SPLITS;
      if (is) *done = 0;
    }
    __syncthreads();
    __threadfence();
    return is;
  }

  __device__ __forceinline__ void finish_scratch() const {
    __shared__ float factor[PARTS * 16 > WARPS * 16 ? PARTS * 16 : WARPS * 16], total[16][2];
    if (threadIdx.x < 16)
      factors<WARPS, false>(heads() + threadIdx.x * 2, 32, factor + threadIdx.x,
                            total[threadIdx.x]);
    __syncthreads();
    float* mine = part(blockIdx.x);
    for (int e = threadIdx.x * 4; e < 16 * D; e += 128 * WARPS)
      __stcg(reinterpret_cast<float4*>(mine + e),
             weighted<WARPS, false>(saved() + e / D * LINE + e % D, 16 * LINE, factor + e / D));
    if (threadIdx.x < 32) __stcg(mine + 16 * D + threadIdx.x, total[threadIdx.x / 2][threadIdx.x % 2]);
    if (!is_last()) return;
    if (threadIdx.x < 16)
      factors<PARTS, true>(part(0) + 16 * D + threadIdx.x * 2, 16 * (D + 2), factor + threadIdx.x,
                           total[threadIdx.x]);
    __syncthreads();
#pragma unroll 4
    for (int e = threadIdx.x * 4; e < 16 * D; e += 128 * WARPS) {
      float4 y = weighted<PARTS, true>(part(0) + e, 16 * (D + 2), factor + e / D);
      const float scale = 1.0f / total[e / D][1];
      uint2 two = make_uint2(pair<T>(y.x * scale, y.y * scale), pair<T>(y.z * scale, y.w * scale));
      if (tile * 16 + e / D < N * G) *reinterpret_cast<uint2*>(result(e / D) + e % D) = two;
    }
  }

  __device__ __forceinline__ void finish(const Softmax<C>& s) const {
    __syncthreads();
    s.save(saved() + warp * 16 * LINE, heads() + warp * 32, lane);
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    finish_cluster();
#else
    finish_scratch();
#endif
  }
};

template <typename C> __device__ __forceinline__ void attend(const attend_args<C>& a) {
  extern __shared__ __align__(128) char shared[];
  // Where the rows begin and what they held before is no result of the launch right before this.
  Attend<C> block(a, shared);
  Softmax<C> s;
  if (blockIdx.x)
    block.attend_old(s);
  else
    block.attend_new(s);
  let_next_start();
  block.finish(s);
}

}  // namespace pcc
