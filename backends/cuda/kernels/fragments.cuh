// Rows of D halves in shared memory, so placed that the tensor cores' loads do not collide.
#pragma once
#include "common.cuh"

namespace pcc {

// Byte offset of 16 bytes `c` of row `row`: the groups of a row are permuted by the row.
template <int D> __device__ __forceinline__ int place(int row, int c) {
  constexpr int GROUPS = D / 8, EVEN = GROUPS & -GROUPS, MASK = (EVEN < 8 ? EVEN : 8) - 1;
  return row * D * 2 + (c ^ (row & MASK)) * 16;
}

__device__ __forceinline__ uint4 load_matrices(u32 at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load_transposed(u32 at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}

// Copy `size` of 16 bytes, zeros for the rest.
__device__ __forceinline__ void copy_async(u32 to, const void* from, u32 size) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size)
               : "memory");
}

}  // namespace pcc
