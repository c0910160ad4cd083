// y = round(x) W for few rows of x: streams W, packed as pack.py says, through tensor cores.
//
// Block (column, slab, part): rows 64 part.. of x, its slab of K in shared memory; each warp streams
// the slab of its strips of 32 columns of W. A strip is complete once all its slabs have written
// their sums to `partial`; the last one adds them in order of the slabs and stores the result.
#pragma once
#include "epilogue.cuh"
#include "stream.cuh"

namespace pcc {

template <typename C> struct linear_args : epilogue_args<C> {
  const void* x;
  const float *gain, *squares;
  const typename C::T* w;
  float* partial;
  u32* count;
};

template <typename C> struct Linear {
  using T = typename C::T;
  static constexpr int BLOCKS = (C::K + 31) / 32, STRIPS = (C::N + 31) / 32;
  static constexpr int ROWS = 8 * C::TILES, THREADS = 32 * C::WARPS;
  static constexpr int RING = C::WARPS * C::STAGES * PIECE;
  static constexpr bool WIDE = C::SOURCE != 1, NORM = C::SOURCE == 2;
  static constexpr int GROUPS = C::SLAB * 4, AHEAD = NORM ? 2 : WIDE ? 4 : 8;

  const linear_args<C>& a;
  char* shared;
  float* scale;
  int warp, lane, first, length, row0;

  __device__ __forceinline__ Linear(const linear_args<C>& a_, char* shared_)
      : a(a_), shared(shared_), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    first = BLOCKS * int(blockIdx.y) / C::SLABS;
    length = BLOCKS * (int(blockIdx.y) + 1) / C::SLABS - first;
    row0 = 64 * int(blockIdx.z);
    scale = reinterpret_cast<float*>(shared + RING + ROWS * C::PITCH);
  }

  // Strips of this warp: those that leave over are spread over all blocks, not in a few.
  __device__ __forceinline__ int strip(int i) const {
    return int(blockIdx.x) + C::COLUMNS * (warp + C::WARPS * i);
  }

  __device__ __forceinline__ const char* piece(int strip, int block) const {
    return reinterpret_cast<const char*>(a.w) + (size_t(strip) * BLOCKS + first + block) * PIECE;
  }

  // scale[m] = 1 / sqrt(sum_s squares[s,m] / K + eps), a warp for each row
  __device__ __forceinline__ void norms() const {
#pragma unroll 2
    for (int m = warp; m < ROWS; m += C::WARPS) {
      float sum = 0;
      if (row0 + m < C::M)
#pragma unroll 4
        for (int s = lane; s < BLOCKS; s += 32) sum += __ldcg(a.squares + size_t(row0 + m) * BLOCKS + s);
      sum = warp_sum(sum);
      if (lane == 0) scale[m] = rsqrtf(sum / C::K + C::EPS);
    }
    __syncthreads();
  }

  // 8 neighbours of a row of x as they lie in memory, and the gains of their columns.
  struct Raw {
    float4 x[WIDE ? 2 : 1], gain[NORM ? 2 : 1];
  };

  // Element i of the slab's 16-byte groups, row by row; zeros beyond M and K.
  __device__ __forceinline__ Raw load(int i) const {
    const int m = row0 + i / GROUPS, k = first * 32 + i % GROUPS * 8;
    Raw raw = {};
    if (i >= ROWS * GROUPS || m >= C::M || k >= C::K) return raw;
    const size_t at = size_t(m) * C::K + k;
    if constexpr (C::K % 8 == 0) {
#pragma unroll
      for (int j = 0; j < (WIDE ? 2 : 1); ++j)
        raw.x[j] = __ldcg(static_cast<const float4*>(a.x) + at / (WIDE ? 4 : 8) + j);
#pragma unroll
      for (int j = 0; NORM && j < 2; ++j)
        raw.gain[j] = __ldg(reinterpret_cast<const float4*>(a.gain + k) + j);
    } else {
      using Value = typename Select<WIDE, float, T>::type;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        bool inside = k + j < C::K;
        if (inside) reinterpret_cast<Value*>(raw.x)[j] = __ldcg(static_cast<const Value*>(a.x) + at + j);
        if (inside && NORM) reinterpret_cast<float*>(raw.gain)[j] = a.gain[k + j];
      }
    }
    return raw;
  }

  __device__ __forceinline__ void put_group(int i, const Raw& raw) const {
    if (i >= ROWS * GROUPS) return;
    const int m = i / GROUPS;
    uint4 v;
    if constexpr (WIDE) {
      float f[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        f[j] = reinterpret_cast<const float*>(raw.x)[j];
        if (NORM) f[j] = f[j] * scale[m] * reinterpret_cast<const float*>(raw.gain)[j];
      }
      v = make_uint4(pair<T>(f[0], f[1]), pair<T>(f[2], f[3]), pair<T>(f[4], f[5]),
                     pair<T>(f[6], f[7]));
    } else {
      v = *reinterpret_cast<const uint4*>(raw.x);
    }
    *reinterpret_cast<uint4*>(shared + RING + m * C::PITCH + i % GROUPS * 16) = v;
  }

  // Rows of x in this slab, rounded, into shared memory; several loads of a thread in flight.
  __device__ __forceinline__ void stage() const {
    Raw raw[AHEAD];
    for (int from = 0; from < ROWS * GROUPS; from += THREADS * AHEAD) {
      const int i = from + threadIdx.x;
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) raw[j] = load(i + j * THREADS);
      if (NORM && from == 0) norms();
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) put_group(i + j * THREADS, raw[j]);
    }
    __syncthreads();
  }

  // One piece: 32 columns of W, 32 of K, all rows of x.
  __device__ __forceinline__ void multiply(float (&sum)[2][C::TILES][4], const uint4 (&w)[4],
                                           int block) const {
    u32 at = shared_address(shared) + RING + (lane / 4) * C::PITCH + block * 64 + (lane % 4) * 16;
#pragma unroll
    for (int m = 0; m < C::TILES; ++m) {
      uint4 x = read_shared(at + m * 8 * C::PITCH);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        Half<T>::mma(sum[t][m], w[t], x.x, x.y);
        Half<T>::mma(sum[t][m], w[2 + t], x.z, x.w);
      }
    }
  }

  // Add the slabs of a strip; false for all but the last of them.
  __device__ __forceinline__ bool combine(float4 (&sum)[2 * C::TILES], int strip) const {
    constexpr int COUNT = 2 * C::TILES;
    float4* all = reinterpret_cast<float4*>(a.partial) +
                  (size_t(blockIdx.z) * STRIPS + strip) * C::SLABS * COUNT * 32 + lane;
    const int c2 = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (row0 + i / 2 * 8 + c2 + i % 2 < C::M)
        __stcg(all + (blockIdx.y * COUNT + i) * 32, sum[i]);
    if (!last_warp(a.count + blockIdx.z * STRIPS + strip, C::SLABS)) return false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float4 total = make_float4(0, 0, 0, 0);
      if (row0 + i / 2 * 8 + c2 + i % 2 < C::M) {
#pragma unroll 8
        for (int s = 0; s < C::SLABS; ++s) {
          float4 v = __ldcg(all + (s * COUNT + i) * 32);
          total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
        }
      }
      sum[i] = total;
    }
    return true;
  }

  __device__ __forceinline__ void run() const {
    Ring<C::STAGES> ring;
    u32 base = shared_address(shared), barriers = base + RING + ROWS * C::PITCH + ROWS * 4;
    ring.open(base + warp * C::STAGES * PIECE, barriers + warp * C::STAGES * 8, lane);
    int next = 0, ahead = 0;  // the piece to ask for: of strip(next), block `ahead`
    auto ask = [&] {
      int s = strip(next);
      ring.issue(piece(s, ahead), s < STRIPS);
      if (++ahead == length) ahead = 0, ++next;
    };
    for (int i = 0; i < C::STAGES; ++i) ask();
    wait_for_launches();
    let_next_start();
    stage();
    for (int i = 0; strip(i) < STRIPS; ++i) {
      float sum[2][C::TILES][4] = {};
      for (int block = 0; block < length; ++block) {
        uint4 w[4];
        ring.take(w);
        ask();
        multiply(sum, w, block);
      }
      finish(sum, strip(i));
    }
#if __CUDA_ARCH__ < 900
    wait_copies<0>();
#endif
  }

  // A thread holds columns 4 (lane / 4) + 0..3 of rows 8 m + 2 (lane % 4) + 0..1.
  __device__ __forceinline__ void finish(const float (&sum)[2][C::TILES][4], int strip) const {
    float4 columns[2 * C::TILES];
#pragma unroll
    for (int i = 0; i < 2 * C::TILES; ++i) {
      int m = i / 2, e = i % 2;
      columns[i] = make_float4(sum[0][m][e], sum[0][m][2 + e], sum[1][m][e], sum[1][m][2 + e]);
    }
    if constexpr (C::SLABS > 1) {
      if (!combine(columns, strip)) return;
    }
#pragma unroll
    for (int i = 0; i < 2 * C::TILES; ++i) {
      int m = row0 + i / 2 * 8 + lane % 4 * 2 + i % 2;
      store<C>(a, columns[i], m, strip * 32 + lane / 4 * 4, lane);
    }
  }
};

template <typename C> __device__ __forceinline__ void linear(const linear_args<C>& a) {
  extern __shared__ __align__(128) char shared[];
  Linear<C>(a, shared).run();
}

}  // namespace pcc
