// What kernels/cuda/instructions.cuh declares, on a CPU: every thread of a block is a fiber, and a
// fiber runs until it has to wait for others. Copies become visible where they are waited for;
// until then their target holds ones (as bits), as shared memory does before it is written. Blocks of
// a cluster run together, and their shared memories lie one behind the other.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <vector>

typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
typedef long long i64;
typedef unsigned long long u64;
using std::max;
using std::min;

#define DEVICE inline
#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) u8* name = dynamic_memory.data() + this_block() * block_bytes

struct Index { int x; };
struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Copy { u32 to; std::vector<u8> bytes; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool ended = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  int generation = 0;  // of the cluster's meeting, when this thread arrived
};
struct Meeting { int arrived = 0; int generation = 0; };

static std::vector<u8> dynamic_memory;
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current, block_threads, block_bytes;
static Index threadIdx, blockIdx, gridDim;
static Meeting warps[128], barriers[16][32], cluster;
static u32 operands[128][32][8];
static int this_block() { return current / block_threads; }  // of its cluster

static void yield() { swapcontext(&fibers[current].context, &scheduler); }
static void meet_at(Meeting& meeting, int count) {
  const int generation = meeting.generation;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    meeting.generation++;
  }
  while (meeting.generation == generation) yield();
}
inline void __syncwarp() { meet_at(warps[current / 32], 32); }
inline void __syncthreads() { meet_at(barriers[this_block()][0], block_threads); }
template <int THREADS>
void meet(int id) { meet_at(barriers[this_block()][id], THREADS); }
inline void arrive_in_cluster() {
  fibers[current].generation = cluster.generation;
  if (++cluster.arrived < (int)fibers.size()) return;
  cluster.arrived = 0;
  cluster.generation++;
}
inline void wait_in_cluster() {
  while (cluster.generation == fibers[current].generation) yield();
}
inline void meet_grid(u32*) {
  static Meeting grid;
  meet_at(grid, gridDim.x);
}
inline int __popc(u32 bits) { return __builtin_popcount(bits); }
inline u32 in_block(u32 address, int rank) { return address % block_bytes + rank * block_bytes; }

inline float as_float(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }
inline u32 as_bits(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }
inline float bf16_float(u16 bits) { return as_float((u32)bits << 16); }
inline float half_float(u16 bits) { _Float16 value; memcpy(&value, &bits, 2); return (float)value; }
inline u32 __float_as_uint(float value) { return as_bits(value); }
inline float tf32_float(u32 bits) { return as_float(bits & 0xFFFFE000u); }
inline u16 float_half(float value) {
  const _Float16 half = (_Float16)value;
  u16 bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline u16 float_bf16(float value) {
  if (value != value) return 0x7FFF;
  u32 bits = as_bits(value);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline int nearest(float value) { return value == value ? (int)nearbyintf(value) : 0; }
inline u32 both(u32 a, u32 b, float (*f)(float, float)) {
  u32 low = float_bf16(f(bf16_float(a), bf16_float(b)));
  return low | (u32)float_bf16(f(bf16_float(a >> 16), bf16_float(b >> 16))) << 16;
}
inline u32 multiply2(u32 a, u32 b) { return both(a, b, [](float x, float y) { return x * y; }); }
inline u32 minus2(u32 a, u32 b) { return both(a, b, [](float x, float y) { return x - y; }); }
inline u32 larger2(u32 a, u32 b) {
  return max(a & 0xFFFFu, b & 0xFFFFu) | max(a >> 16, b >> 16) << 16;
}
template <int BITS>
u32 shift_left(u32 a) { return a << BITS; }
template <int BITS>
u32 shift_right(u32 a) { return a >> BITS; }
inline u32 and_or(u32 a, u32 mask, u32 c) { return (a & mask) | c; }
inline u32 select(u32 mask, u32 a, u32 b) { return (mask & a) | (~mask & b); }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 source = a | (u64)b << 32;
  u32 result = 0;
  for (int i = 0; i < 4; i++)
    result |= (u32)(source >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
inline float __fdividef(float x, float y) { return x / y; }
inline float power_of_2(float x) { return exp2f(x); }
inline float __expf(float x) { return expf(x); }

// ``numbers`` of them in 32 bits; the instruction takes eight times as many columns.
inline void mma_of(float (&d)[4], const u32 (&own)[6], int numbers, float (*value)(u32)) {
  const int warp = current / 32, lane = threadIdx.x % 32, width = 32 / numbers;
  memcpy(operands[warp][lane], own, sizeof own);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 8 * numbers; k++) {
      const int word = k / numbers, down = k % numbers * width;
      const u32* a = operands[warp][row % 8 * 4 + word % 4];
      const u32* b = operands[warp][column * 4 + word % 4];
      sum += (double)value(a[word / 4 * 2 + row / 8] >> down) * value(b[4 + word / 4] >> down);
    }
    d[i] = (float)sum;
  }
  __syncwarp();
}
inline void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_of(d, {a0, a1, a2, a3, b0, b1}, 2, [](u32 bits) { return bf16_float((u16)bits); });
}
inline void mma_half(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_of(d, {a0, a1, a2, a3, b0, b1}, 2, [](u32 bits) { return half_float((u16)bits); });
}
inline void mma_tf32(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_of(d, {a0, a1, a2, a3, b0, b1}, 1, tf32_float);
}
inline void mma_digits(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int warp = current / 32, lane = threadIdx.x % 32;
  const u32 own[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(operands[warp][lane], own, sizeof own);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 32; k++) {
      const int word = k / 4, down = k % 4 * 8;
      const u32 a = operands[warp][row % 8 * 4 + word % 4][word / 4 * 2 + row / 8] >> down;
      const u32 b = operands[warp][column * 4 + word % 4][4 + word / 4] >> down;
      d[i] += (u8)a * (int8_t)b;
    }
  }
  __syncwarp();
}
inline u8* shared_at(u32 address, u32 size) {
  if (address % size || address + size > dynamic_memory.size()) {
    fprintf(stderr, "shared address %u of %zu, %u bytes\n", address, dynamic_memory.size(), size);
    abort();
  }
  return dynamic_memory.data() + address;
}
inline void ldmatrix(u32 (&w)[4], u32 address) {
  const int warp = current / 32, lane = threadIdx.x % 32;
  operands[warp][lane][0] = address;
  __syncwarp();
  for (int i = 0; i < 4; i++)
    memcpy(&w[i], shared_at(operands[warp][i * 8 + lane / 4][0], 16) + lane % 4 * 4, 4);
  __syncwarp();
}
inline u32 shared_u8(u32 address) { return *shared_at(address, 1); }
inline u32 shared_u16(u32 address) { u16 v; memcpy(&v, shared_at(address, 2), 2); return v; }
inline u32 shared_u32(u32 address) { u32 v; memcpy(&v, shared_at(address, 4), 4); return v; }
inline void store_shared(u32 address, u32 value) { memcpy(shared_at(address, 4), &value, 4); }
inline void store_shared(u32 address, u32 first, u32 second) {
  store_shared(address, first);
  store_shared(address + 4, second);
}
inline void set_bits(u32* word, u32 bits) { *word |= bits; }
inline u32 shared_address(const void* at) { return (u32)((const u8*)at - dynamic_memory.data()); }
template <typename T>
T load_past_l1(const T* from) { return *from; }
template <typename T>
void store_kept(T* to, T value) { *to = value; }
inline uint4 load_once(const void* from, bool inside) {
  uint4 v = {0, 0, 0, 0};
  if (inside) memcpy(&v, from, 16);
  return v;
}
inline uint4 load_past_l1(const void* from, bool inside) { return load_once(from, inside); }
inline void copy(u32 to, const void* from, u32 size, bool inside) {
  std::vector<u8> bytes(size, 0);
  if (inside && (u64)from % size) {
    fprintf(stderr, "a copy of %u bytes from %p\n", size, from);
    abort();
  }
  if (inside) memcpy(bytes.data(), from, size);
  memset(shared_at(to, size), 0xFF, size);
  fibers[current].open.push_back({to, bytes});
}
// What tests put in place of a tensor map: an address, sizes, strides of all but bytes, a box, whether
// it is swizzled.
struct alignas(64) TensorMap { i64 data, sizes[4], strides[3], box[3], swizzled; };
struct Barrier {
  int count = 1, left = 1, phases = 0, expected = 0;  // bytes that are not here yet
  std::deque<std::vector<Copy>> boxes;  // on their way, or a thread's copies
  void pass() {
    if (left || expected || !boxes.empty()) return;
    phases++;
    left = count;
  }
};
static std::map<u32, Barrier> engine;
inline void begin_barrier(u32 barrier, int count = 1) {
  engine[barrier] = Barrier();
  engine[barrier].count = engine[barrier].left = count;
}
inline void arrive(u32 barrier) { engine[barrier].left--; engine[barrier].pass(); }
inline void barriers_have_begun() { __syncwarp(); }
inline void expect(u32 barrier, int bytes) {
  engine[barrier].expected += bytes;
  engine[barrier].left--;
  engine[barrier].pass();
}
inline void bring(u32 barrier, const std::vector<Copy>& parts) {
  engine[barrier].boxes.push_back(parts);
  for (const Copy& one : parts) engine[barrier].expected -= (int)one.bytes.size();
}
inline void copy_box(u32 to, const TensorMap& map, int x, int y, int z, u32 barrier) {
  const bool swizzled = map.swizzled;
  std::vector<Copy> rows;
  u32 row = to;
  for (int shard = 0; shard < map.box[2]; shard++)
    for (int i = 0; i < map.box[1]; i++, row += map.box[0])
      for (int chunk = 0; chunk < map.box[0] / 16; chunk++) {
        const int at = x + chunk * 16;
        std::vector<u8> found(16, 0);
        const u8* from = (const u8*)map.data + at + (y + i) * map.strides[0] +
                         shard * map.strides[1] + z * map.strides[2];
        const i64 inside = min((i64)16, map.sizes[0] - at);
        if (inside > 0 && y + i < map.sizes[1]) memcpy(found.data(), from, inside);
        const u32 place = row + (u32)((chunk ^ (swizzled ? row >> 7 & 7 : 0)) << 4);
        memset(shared_at(place, 16), 0xFF, 16);
        rows.push_back({place, found});
      }
  if (to % (swizzled ? 1024 : 128)) abort();
  bring(barrier, rows);
}
inline void copy_tile(u32 to, const TensorMap& map, int x, int y, int z, u32 barrier, int bytes) {
  expect(barrier, bytes);
  copy_box(to, map, x, y, z, barrier);
  if (engine[barrier].expected) abort();
}
inline void copy_bytes(u32 to, const void* from, int bytes, u32 barrier) {
  if (bytes % 16 || (u64)from % 16 || to % 16) {
    fprintf(stderr, "a copy of %d bytes from %p to %u\n", bytes, from, to);
    abort();
  }
  shared_at(to + bytes - 16, 16);
  memset(shared_at(to, 16), 0xFF, bytes);
  bring(barrier, {{to, std::vector<u8>((const u8*)from, (const u8*)from + bytes)}});
}
inline void send(u32 to, const float4& v, u32 barrier) {
  shared_at(to, 16);
  bring(barrier, {{to, std::vector<u8>((const u8*)&v, (const u8*)&v + 16)}});
}
inline void arrive_with_copies(u32 barrier) {
  engine[barrier].boxes.push_back(std::move(fibers[current].open));
  fibers[current].open.clear();
  engine[barrier].left--;
}
inline void prefetch_map(const TensorMap&) {}
inline void prefetch_tile(const TensorMap&, int, int, int) {}
inline int from_lane(int value, int from) {
  const int warp = current / 32, lane = threadIdx.x % 32;
  operands[warp][lane][0] = (u32)value;
  __syncwarp();
  value = (int)operands[warp][from][0];
  __syncwarp();
  return value;
}
inline int most_of_lanes(int value) {
  int most = value;
  for (int lane = 0; lane < 32; lane++) most = max(most, from_lane(value, lane));
  return most;
}
inline int least_of_lanes(int value) { return ~most_of_lanes(~value); }
inline int from_first_thread(int value) { return from_lane(value, 0); }
inline u32 lanes_with(bool is) {
  u32 lanes = 0;
  for (int lane = 0; lane < 32; lane++) lanes |= (u32)(from_lane(is, lane) != 0) << lane;
  return lanes;
}
inline int from_thread(int value, int apart) { return from_lane(value, threadIdx.x % 32 ^ apart); }
inline float from_thread(float value, int apart) {
  return as_float((u32)from_thread((int)as_bits(value), apart));
}
inline void wait_barrier(u32 barrier, int phase) {
  Barrier& own = engine[barrier];
  while (own.phases % 2 == phase) {
    if (own.boxes.empty()) {
      yield();
      continue;
    }
    for (Copy& one : own.boxes.front())
      memcpy(shared_at(one.to, 1), one.bytes.data(), one.bytes.size());
    own.boxes.pop_front();
    own.pass();
  }
}
inline void begin_products() {}
inline void end_products() {}
template <int LEFT>
void wait_products() {}
template <typename T>
void hold(T&) {}
inline void show_to_products() {}
template <int SLOTS>
void products(float (&d)[SLOTS / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 matrices, int from, bool keep) {
  const u32 at = (u32)(matrices & 0x3FFF) * 16 + from;
  const int warp = current / 32, lane = threadIdx.x % 32;
  const u32 own[4] = {a0, a1, a2, a3};
  memcpy(operands[warp][lane], own, sizeof own);
  __syncwarp();
  for (int i = 0; i < SLOTS / 2; i++) {
    const int row = lane / 4 + i / 2 % 2 * 8, slot = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = keep ? d[i] : 0.0;
    for (int k = 0; k < 16; k++) {
      const u32 left = operands[warp][row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8];
      const u8* right = shared_at(at + k / 8 * SLOTS * 16 + slot * 16 + k % 8 * 2, 2);
      sum += (double)bf16_float(left >> 16 * (k % 2)) * bf16_float(*(const u16*)right);
    }
    d[i] = (float)sum;
  }
  __syncwarp();
}
inline void copy16(u32 to, const void* from, bool inside) { copy(to, from, 16, inside); }
template <int N>
void load_shared(u32 (&v)[N], u32 address) { memcpy(v, shared_at(address, 4 * N), 4 * N); }
inline void copy4(u32 to, const void* from, bool inside) { copy(to, from, 4, inside); }
inline void commit() {
  fibers[current].groups.push_back(std::move(fibers[current].open));
  fibers[current].open.clear();
}
template <int N>
void wait_groups() {
  auto& groups = fibers[current].groups;
  while (groups.size() > N) {
    for (Copy& one : groups.front())
      memcpy(shared_at(one.to, 1), one.bytes.data(), one.bytes.size());
    groups.pop_front();
  }
}
template <int>
void give_registers() {}
template <int>
void take_registers() {}
inline void wait_for_previous() {}
inline void let_next_begin() {}

// The ``blocks`` of a cluster, ``first`` and those behind it.
static void run_cluster(int first, int blocks, int threads, int shared,
                        const std::function<void()>& body) {
  block_threads = threads;
  block_bytes = (shared + 1023) / 1024 * 1024;
  dynamic_memory.assign(block_bytes * (blocks - 1) + shared, 0xFF);
  fibers.assign(threads * blocks, Fiber());
  static const std::function<void()>* entry;
  entry = &body;
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(1 << 17);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, +[] { (*entry)(); fibers[current].ended = true; }, 0);
  }
  for (int left = 1; left;) {
    left = 0;
    for (current = 0; current < (int)fibers.size(); current++) {
      if (fibers[current].ended) continue;
      left++;
      threadIdx.x = current % threads;
      blockIdx.x = first + this_block();
      swapcontext(&scheduler, &fibers[current].context);
    }
  }
}
