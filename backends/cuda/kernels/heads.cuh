// What the parts of attention share: sizes, what a query may read, rotation, queries in place.
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

// Of one block of threads; its 16 query rows and the rest of its shared memory.
template <typename C> struct Heads {
  using T = typename C::T;
  static constexpr int D = C::D, N = C::N, G = C::H / C::HK, WARPS = 4, STAGES = C::STAGES;
  static constexpr int QUERY = 16 * D * 2, BLOCK = 16 * D * 2;  // bytes of 16 rows
  static constexpr int NEW = (N + 15) / 16, POOLS = (C::CHUNKS + 15) / 16;
  static constexpr int TOUCHED = C::CHUNKS * (C::EVA ? C::CHUNK : 0);  // rows of their chunks
  // In blocks: the rings of old keys, or all new ones with what their summaries need.
  static constexpr int RING = WARPS * STAGES * 2, HELD = (NEW + POOLS + (TOUCHED + 15) / 16) * 2;
  static constexpr int BLOCKS = RING > HELD ? RING : HELD, AREA = BLOCKS * BLOCK;
  static constexpr int LINE = Softmax<C>::LINE, WIDTH = (C::H + 2 * C::HK) * D;
  static constexpr int PARTS = C::SPLITS + (C::EVA ? 2 : 1);

  const attend_args<C>& a;
  char* shared;
  u32 base, area;
  int warp, lane, b, h, tile, start, first, last;  // first, last: query positions of the tile

  __device__ __forceinline__ Heads(const attend_args<C>& a_, char* shared_)
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

  // The query position of this lane's row r.
  __device__ __forceinline__ int query(int r) const {
    return min((tile * 16 + lane / 4 + 8 * r) / G, N - 1);
  }
};

// Dependent names must be said where they are used.
#define PCC_HEADS(C)                                                                            \
  using Base = Heads<C>;                                                                        \
  using T = typename Base::T;                                                                   \
  using Unit = typename Base::Unit;                                                             \
  using Base::D, Base::N, Base::G, Base::WARPS, Base::STAGES, Base::QUERY, Base::BLOCK;         \
  using Base::NEW, Base::POOLS, Base::TOUCHED, Base::BLOCKS, Base::AREA, Base::LINE;            \
  using Base::WIDTH, Base::PARTS, Base::V, Base::TURNS, Base::UNITS, Base::a, Base::shared;     \
  using Base::base, Base::area, Base::warp, Base::lane, Base::b, Base::h, Base::tile;           \
  using Base::start, Base::first, Base::last, Base::least, Base::past, Base::slot;              \
  using Base::cache, Base::input, Base::held, Base::read, Base::write, Base::load;              \
  using Base::turn, Base::query;

}  // namespace pcc
