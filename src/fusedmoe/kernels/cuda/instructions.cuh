// The instructions of Hopper (sm_90) that the kernels of this folder use, one function each.
//
// A launcher puts this text in front of a kernel's; a test puts functions of the same names there
// that do the same on a CPU.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE float bf16_float(u16 bits) { return __uint_as_float((u32)bits << 16); }
DEVICE float half_float(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
DEVICE u16 float_bf16(float value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
DEVICE u32 multiply2(u32 a, u32 b) {
  u32 c;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
DEVICE u32 minus2(u32 a, u32 b) {
  u32 c;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
template <int TABLE>
DEVICE u32 lop3(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return d;
}
// Shifts that stay where they are written; to the left, ones that multiply, at full rate.
template <int BITS>
DEVICE u32 shift_left(u32 a) {
  u32 b;
  asm("mul.lo.u32 %0, %1, %2;" : "=r"(b) : "r"(a), "n"(1 << BITS));
  return b;
}
template <int BITS>
DEVICE u32 shift_right(u32 a) {
  u32 b;
  asm("shr.u32 %0, %1, %2;" : "=r"(b) : "r"(a), "n"(BITS));
  return b;
}
DEVICE u32 and_or(u32 a, u32 mask, u32 c) { return lop3<0xEA>(a, mask, c); }
DEVICE u32 select(u32 mask, u32 a, u32 b) { return lop3<0xCA>(mask, a, b); }
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void ldmatrix(u32 (&w)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(address)
               : "memory");
}
DEVICE u32 shared_u8(u32 address) {
  u32 value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
DEVICE u32 shared_u16(u32 address) {
  u16 value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  return value;
}
DEVICE u32 shared_u32(u32 address) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
DEVICE void copy16(u32 to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
DEVICE void copy4(u32 to, const void* from, bool inside) {  // zeros where it is not
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 4 : 0)
               : "memory");
}
// Past the L1, which may hold lines from before the launch that wrote them.
DEVICE int load_past_l1(const int* from) {
  int value;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
DEVICE i64 load_past_l1(const i64* from) {
  i64 value;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
DEVICE u32 shared_address(const void* memory) { return (u32)__cvta_generic_to_shared(memory); }
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Barrier ``id`` of THREADS threads.
template <int THREADS>
DEVICE void meet(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}
// Programmatic dependent launches.
DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
