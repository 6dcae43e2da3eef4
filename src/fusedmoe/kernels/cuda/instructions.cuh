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
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
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
DEVICE u16 float_half(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
DEVICE float power_of_2(float exponent) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(exponent));
  return value;
}
DEVICE int nearest(float value) {
  int whole;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(whole) : "f"(value));
  return whole;
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
// The larger ones of two numbers of 16 bits without a sign.
DEVICE u32 larger2(u32 a, u32 b) {
  u32 c;
  asm("max.u16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
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
DEVICE void mma_half(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_tf32(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Integers of 8 bits, those of a without a sign.
DEVICE void mma_digits(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
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
DEVICE void store_shared(u32 address, u32 value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE void store_shared(u32 address, u32 first, u32 second) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(first), "r"(second) : "memory");
}
// Barriers that copies arrive at: one arrival, and the bytes that it announces.
DEVICE void begin_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barriers_have_begun() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncwarp();
}
// An arrival once this thread's cp.async until here are done; the barrier counts on it.
DEVICE void arrive_with_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
DEVICE void wait_barrier(u32 barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}
// What the copy engine reads tensors by, encoded by the driver.
struct alignas(64) TensorMap {
  u8 bytes[128];
};
DEVICE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// An arrival of one thread, which announces bytes that copies bring.
DEVICE void expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Which lines the L2 gives up last: rows that the next launch reads. And which first: what the copy
// engine brings are weights, which stream by once and would push out those rows.
DEVICE u64 kept() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE u64 passing() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE void store_kept(float* to, float value) {
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(value), "l"(kept())
               : "memory");
}
DEVICE void store_kept(u16* to, u16 value) {
  asm volatile("st.global.L2::cache_hint.u16 [%0], %1, %2;" ::"l"(to), "h"(value), "l"(kept())
               : "memory");
}
// The box of ``map`` from byte ``x`` of row ``y`` of every shard of expert ``z`` on.
DEVICE void copy_box(u32 to, const TensorMap& map, int x, int y, int z, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, 0, %4}], [%5], %6;" ::"r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(passing())
      : "memory");
}
DEVICE void copy_tile(u32 to, const TensorMap& map, int x, int y, int z, u32 barrier, int bytes) {
  expect(barrier, bytes);
  copy_box(to, map, x, y, z, barrier);
}
// Neighbouring bytes, a multiple of 16 of them from a multiple of 16 on.
DEVICE void copy_bytes(u32 to, const void* from, int bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(passing())
      : "memory");
}
DEVICE void prefetch_tile(const TensorMap& map, int x, int y, int z) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, 0, %3}];" ::"l"(&map),
               "r"(x), "r"(y), "r"(z)
               : "memory");
}
DEVICE float from_thread(float value, int apart) { return __shfl_xor_sync(~0u, value, apart); }
DEVICE int from_thread(int value, int apart) { return __shfl_xor_sync(~0u, value, apart); }
DEVICE int from_lane(int value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE u32 lanes_with(bool is) { return __ballot_sync(~0u, is); }
DEVICE int most_of_lanes(int value) { return __reduce_max_sync(~0u, value); }
DEVICE int least_of_lanes(int value) { return __reduce_min_sync(~0u, value); }
DEVICE int from_first_thread(int value) { return __shfl_sync(~0u, value, 0); }
// WGMMA, asynchronous: sums and numbers in registers are theirs from begin to wait, and hold() keeps
// the compiler from touching them.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
DEVICE void hold(float& value) { asm volatile("" : "+f"(value)::"memory"); }
DEVICE void hold(u32& value) { asm volatile("" : "+r"(value)::"memory"); }
// What barriers have shown of shared memory to this thread, before WGMMA reads it.
DEVICE void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// d = 16 x 16 numbers a of this warp times 16 x SLOTS of b, plus d if ``keep``. b: two rows of
// matrices of 8 slots by 8 columns, 128 bytes each, slots first.
#define SUM(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NUMBERS_AND_B "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(1), "r"((int)keep)
template <int SLOTS>
DEVICE void products(float (&d)[SLOTS / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 matrices, int at, bool keep) {
  const u64 b = matrices + (at >> 4);
  static_assert(SLOTS <= 32 && SLOTS % 8 == 0, "");
  if constexpr (SLOTS == 8)
    asm volatile(
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, keep, "
        "%9, %9, 0;\n}"
        : SUM(0)
        : NUMBERS_AND_B
        : "memory");
  if constexpr (SLOTS == 16)
    asm volatile(
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %14, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, "
        "{%8,%9,%10,%11}, %12, keep, %13, %13, 0;\n}"
        : SUM(0), SUM(4)
        : NUMBERS_AND_B
        : "memory");
  if constexpr (SLOTS == 24)
    asm volatile(
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,"
        "%11}, {%12,%13,%14,%15}, %16, keep, %17, %17, 0;\n}"
        : SUM(0), SUM(4), SUM(8)
        : NUMBERS_AND_B
        : "memory");
  if constexpr (SLOTS == 32)
    asm volatile(
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %22, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,"
        "%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, keep, %21, %21, 0;\n}"
        : SUM(0), SUM(4), SUM(8), SUM(12)
        : NUMBERS_AND_B
        : "memory");
}
#undef SUM
#undef NUMBERS_AND_B
DEVICE void copy16(u32 to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
DEVICE void load_shared(u32 (&v)[4], u32 address) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}
DEVICE void load_shared(u32 (&v)[2], u32 address) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
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
DEVICE u16 load_past_l1(const u16* from) {
  u16 value;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(value) : "l"(from) : "memory");
  return value;
}
DEVICE u8 load_past_l1(const u8* from) {
  u32 value;
  asm volatile("ld.global.cg.u8 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return (u8)value;
}
DEVICE i64 load_past_l1(const i64* from) {
  i64 value;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
// One thread of each block of a grid whose blocks all run at once: past it, what any block's threads
// had written in front of a barrier with theirs is seen. The word's highest bit turns over.
DEVICE void meet_grid(u32* word) {
  const u32 own = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
  u32 before, now;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(word), "r"(own)
               : "memory");
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
  } while (!((before ^ now) >> 31));
}
// Of a word of shared memory, whoever sets others at the same time.
DEVICE void set_bits(u32* word, u32 bits) { atomicOr(word, bits); }
DEVICE u32 shared_address(const void* memory) { return (u32)__cvta_generic_to_shared(memory); }
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// 16 bytes of global memory, zeros where not ``inside``; kept by no L1.
DEVICE uint4 load_once(const void* from, bool inside) {
  uint4 v = {0, 0, 0, 0};
  if (inside)
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
  return v;
}
DEVICE uint4 load_past_l1(const void* from, bool inside) {
  uint4 v = {0, 0, 0, 0};
  if (inside)
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
  return v;
}
// Blocks of a cluster: a barrier in two halves (of memory it orders what fences have), an address in
// another block's shared memory, and 16 bytes sent there, which that block's barrier counts.
DEVICE void arrive_in_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void wait_in_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE u32 in_block(u32 address, int rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
DEVICE void send(u32 to, const float4& v, u32 barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
          to),
      "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(__float_as_uint(v.z)),
      "r"(__float_as_uint(v.w)), "r"(barrier)
      : "memory");
}
// Barrier ``id`` of THREADS threads.
template <int THREADS>
DEVICE void meet(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}
// Registers of a thread, of four neighbouring warps at a time.
template <int COUNT>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
// Programmatic dependent launches.
DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
