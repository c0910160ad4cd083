// What `narrow.cuh` asks of a GPU from sm_90 on, for a CPU: tensor cores, the copy engine and its
// barriers, clusters, and loads that know their arrays. Threads are the fibers of `fibers.cuh`.
//
// What is asynchronous on a GPU comes late here, by the schedule: at once, or after other work and
// in any order. What no program may rest on ends this one, with a line that says what was done.
// Plain writes to shared memory are seen at once, so fences that order them are not tested.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>

#include <map>

#include "fibers.cuh"

#undef __shared__
#define __shared__  // only in the declaration of dynamic memory, which `own` stands for
#define PCC_CLUSTER(n)
#define __CUDA_ARCH__ 900

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct __half { unsigned short bits; };
struct __nv_bfloat16 { unsigned short bits; };

namespace pcc_host {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "%s: block %u, thread %u\n", what, blockIdx.x, threadIdx.x);
  _Exit(3);
}

constexpr unsigned PLACE = 20;  // bits of a place in the shared memory of a block; above: the block
constexpr unsigned STUCK = 400;  // looks at barriers, of each thread, without any progress

struct Array { const char* data; size_t bytes; bool early; };
struct Mbarrier { int arrivals = 0, phase = 0; long bytes = 0; bool sent = false; };
struct Copy { unsigned to, barrier; std::vector<char> data; bool sent; };
struct Cluster { unsigned arrived = 0, generation = 0; };
struct Member { bool arrived = false, waited = false; unsigned generation = 0; };

inline std::vector<Array> arrays;       // of the launch
inline std::vector<char*> memories;     // shared, of each block
inline size_t room = 0;                 // bytes of each
inline unsigned cluster_blocks = 1;
inline std::map<unsigned, Mbarrier> mbarriers;
inline std::vector<Copy> copies;        // under way
inline std::vector<Cluster> clusters;
inline std::vector<Member> members;     // threads
inline std::vector<unsigned> left, lags;  // threads of a block that run; pauses of a warp
inline unsigned idle = 0, rate = 1;     // one in `rate` looks sees a copy end
inline bool uneven = false;             // whether warps fall behind

inline Member& member() { return members[blockIdx.x * blockDim.x + threadIdx.x]; }
inline char* own() { return memories[blockIdx.x]; }

inline char* place(unsigned at, size_t bytes, bool mine = true) {
  const unsigned block = at >> PLACE, offset = at & ((1u << PLACE) - 1);
  if (mine && block != blockIdx.x) fail("another block's memory");
  if (block >= memories.size() || offset + bytes > room) fail("beyond the shared memory");
  if (offset % bytes && offset % 16) fail("a place that is not aligned");
  return memories[block] + offset;
}

inline void settle(Mbarrier& b) {
  if (b.arrivals < 0) fail("a barrier has more arrivals than it was made for");
  if (b.arrivals == 0 && b.bytes == 0) ++b.phase, b.arrivals = 1;
}

inline Mbarrier& mbarrier(unsigned at) {
  auto found = mbarriers.find(at);
  if (found == mbarriers.end()) fail("a barrier that was not made");
  return found->second;
}

// Some copy that is under way ends.
inline void deliver() {
  const size_t pick = order() % copies.size();
  Copy c = std::move(copies[pick]);
  copies.erase(copies.begin() + (long)pick);
  if (left[c.to >> PLACE] == 0) fail("a copy into a block that has ended");
  memcpy(place(c.to, c.data.size(), false), c.data.data(), c.data.size());
  Mbarrier& b = mbarrier(c.barrier);
  b.bytes -= (long)c.data.size();
  b.sent |= c.sent;
  settle(b);
  idle = 0;
}

inline void look() {
  if (!copies.empty() && order() % rate == 0) deliver();
}

inline void post(unsigned to, const void* from, size_t bytes, unsigned barrier, bool sent) {
  const char* data = static_cast<const char*>(from);
  place(to, bytes, false);
  copies.push_back({to, barrier, std::vector<char>(data, data + bytes), sent});
  look();
}

// Now and then a warp falls far behind the others.
inline void linger() {
  idle = 0;
  look();
  if (!uneven || threadIdx.x % 32) return;
  unsigned& lag = lags[warp_of(now)];
  if (order() % 16 == 0) lag = order() % 4 ? 0 : order() % 600;
  for (unsigned n = order() % (lag + 1); n; --n) idle = 0, pause();
}

inline void spin() {
  if (++idle > STUCK * members.size() && copies.empty()) fail("all wait for what does not come");
  look();
  pause();
}

inline void read(const void* from, size_t bytes) {
  const char* p = static_cast<const char*>(from);
  if (reinterpret_cast<uintptr_t>(p) % (bytes < 16 ? bytes : 16)) fail("a load is not aligned");
  for (const Array& a : arrays)
    if (p >= a.data && p + bytes <= a.data + a.bytes) {
      if (!a.early && !member().waited) fail("read before the wait for the launches before");
      return;
    }
  fail("a load outside of all arrays");
}

inline float reciprocal_root(float x) { return 1.0f / sqrtf(x); }

struct Operands { uint4 a; unsigned b[2]; };
inline std::vector<Operands> operands;  // of each thread

// mma.m16n8k16, by the layout of fragments in the PTX manual: register i of the first operand has
// row lane / 4 + 8 (i mod 2), columns 2 (lane mod 4) + {0, 1} + 8 (i / 2). Summed in double.
template <typename H> void mma(float (&d)[4], uint4 a, unsigned b0, unsigned b1) {
  const unsigned lane = threadIdx.x % 32, base = warp_of(now) * 32;
  operands[base + lane] = {a, {b0, b1}};
  warp_wait();
  auto half = [](unsigned word, unsigned k) {
    return double(H::wide({(unsigned short)(k % 2 ? word >> 16 : word)}));
  };
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    double sum = d[e];
    for (unsigned k = 0; k < 16; ++k) {
      const Operands& left = operands[base + row % 8 * 4 + k % 8 / 2];
      const unsigned* each = &left.a.x;
      const Operands& right = operands[base + column * 4 + k % 8 / 2];
      sum += half(each[row / 8 + k / 8 * 2], k) * half(right.b[k / 8], k);
    }
    d[e] = float(sum);
  }
  warp_wait();
}

// Bytes b0 b1 b2 b3, each less 128, as the halves (b0, b2) and (b1, b3).
template <typename H> void integers(unsigned word, unsigned& even, unsigned& odd) {
  auto half = [&](unsigned i) {
    return unsigned(H::round(float(int(word >> 8 * i & 255) - 128)).bits);
  };
  even = half(0) | half(2) << 16, odd = half(1) | half(3) << 16;
}

}  // namespace pcc_host

#define rsqrtf pcc_host::reciprocal_root
template <typename V> V __ldg(const V* p) { return pcc_host::read(p, sizeof(V)), *p; }
template <typename V> V __ldcg(const V* p) { return pcc_host::read(p, sizeof(V)), *p; }

namespace pcc {

typedef unsigned u32;
typedef unsigned long long u64;
using pcc_host::fail;

template <typename T> struct Half;
template <> struct Half<__half> {
  static __half round(float x) { return {float_to_half_bits(x)}; }
  static float wide(__half x) { return half_bits_to_float(x.bits); }
  static void mma(float (&d)[4], uint4 a, u32 b0, u32 b1) { pcc_host::mma<Half>(d, a, b0, b1); }
  static void integers(u32 word, u32& even, u32& odd) { pcc_host::integers<Half>(word, even, odd); }
};
template <> struct Half<__nv_bfloat16> {
  static __nv_bfloat16 round(float x) { return {float_to_bfloat_bits(x)}; }
  static float wide(__nv_bfloat16 x) { return bfloat_bits_to_float(x.bits); }
  static void mma(float (&d)[4], uint4 a, u32 b0, u32 b1) { pcc_host::mma<Half>(d, a, b0, b1); }
  static void integers(u32 word, u32& even, u32& odd) { pcc_host::integers<Half>(word, even, odd); }
};
template <> struct Half<float> {
  static float round(float x) { return x; }
  static float wide(float x) { return x; }
};

// ---- memory

inline u32 shared_address(const void* p) {
  return u32(static_cast<const char*>(p) - pcc_host::own()) | blockIdx.x << pcc_host::PLACE;
}
inline uint4 read_shared(u32 at) {
  uint4 v;
  memcpy(&v, pcc_host::place(at, 16), 16);
  return v;
}
inline void copy_async(u32, const void*) { fail("a copy of the time before sm_90"); }
inline void commit_copies() { fail("a copy of the time before sm_90"); }
template <int LEFT> void wait_copies() { fail("a copy of the time before sm_90"); }

// ---- launches and clusters

inline void wait_for_launches() { pcc_host::linger(), pcc_host::member().waited = true; }
inline void let_next_start() {}

inline int cluster_rank() { return int(blockIdx.x % pcc_host::cluster_blocks); }
inline pcc_host::Cluster& cluster() {
  return pcc_host::clusters[blockIdx.x / pcc_host::cluster_blocks];
}
inline void arrive_cluster() {
  pcc_host::linger();
  pcc_host::Member& m = pcc_host::member();
  if (m.arrived) fail("arrived at the cluster's barrier twice");
  m.arrived = true, m.generation = cluster().generation;
  if (++cluster().arrived == pcc_host::cluster_blocks * blockDim.x)
    cluster().arrived = 0, ++cluster().generation;
}
inline void wait_cluster() {
  pcc_host::Member& m = pcc_host::member();
  if (!m.arrived) fail("waits at the cluster's barrier without having arrived");
  while (cluster().generation == m.generation) pcc_host::spin();
  m.arrived = false;
  pcc_host::linger();
}
inline void send_cluster(u32 to, float4 v, u32 barrier, int rank) {
  const u32 block = blockIdx.x / pcc_host::cluster_blocks * pcc_host::cluster_blocks + u32(rank);
  const u32 low = (1u << pcc_host::PLACE) - 1, high = block << pcc_host::PLACE;
  pcc_host::linger();
  pcc_host::post((to & low) | high, &v, 16, (barrier & low) | high, true);
}

// ---- the copy engine

inline u64 read_once() { return 0; }
inline void open_barriers(u32 barrier, int count) {
  for (int i = 0; i < count; ++i) {
    pcc_host::place(barrier + 8 * i, 8);
    if (pcc_host::mbarriers.count(barrier + 8 * i)) fail("a barrier is made twice");
    pcc_host::mbarriers[barrier + 8 * i].arrivals = 1;
  }
}
inline void expect_bytes(u32 barrier, u32 bytes) {
  pcc_host::place(barrier, 8);
  pcc_host::Mbarrier& b = pcc_host::mbarrier(barrier);
  b.bytes += bytes, --b.arrivals;
  pcc_host::settle(b);
}
inline void copy_once(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
  pcc_host::read(from, bytes);
  pcc_host::place(to, bytes);
  pcc_host::post(to, from, bytes, barrier, false);
}
inline void await_phase(u32 barrier, u32 phase, bool cluster) {
  pcc_host::place(barrier, 8);
  pcc_host::Mbarrier& b = pcc_host::mbarrier(barrier);
  while (u32(b.phase & 1) == phase) pcc_host::spin();
  if (b.sent && !cluster) fail("what another block sent is awaited at the scope of this block");
  pcc_host::linger();
}
inline void await(u32 barrier, u32 phase) { await_phase(barrier, phase, false); }
inline void await_cluster(u32 barrier, u32 phase) { await_phase(barrier, phase, true); }

}  // namespace pcc
