// Logits of the router's linear layer on Hopper, in one launch: out[t, e] = x[t] . w[e] + bias[e].
//
// A cluster of CLUSTER blocks has a tile of 16 experts by TOKENS tokens; its blocks, and their
// WARPS, share out the columns. The sums of a block's warps meet in its shared memory; those of
// the blocks in that of the block that stores them, a CLUSTER-th of the tile each.
//
// STAGED: everything is asked for at once and lands in shared memory, where each thread reads only
// what it has asked for itself. Otherwise weights and tokens come straight to registers, AHEAD
// pieces of them at a time. The same bits either way.
//
// Weights are the M side of mma.sync. The 16 bytes that a thread reads of a row count as the columns
// that the instruction expects of it, of experts and tokens alike. fp32 is three tf32 products: both
// rounded, and each one rounded with what the other has lost (an infinity becomes NaN).
//
// x [T, H], w [E, H] of one dtype, rows of whole 16 bytes. Rows from T and from E on are not read.
// A token's bits do not depend on the other tokens. Constants come from the launcher as macros.

struct Arguments {
  const u8 *x, *w, *bias;
  u8* out;
  i64 stride_x, stride_w;  // bytes
  int T, E;
};

enum { FP32, BF16, FP16 };
constexpr int EXPERTS = 16, TOKENS = NT * 8, SIZE = EXPERTS * TOKENS;
constexpr int SLICE = SIZE / CLUSTER;  // of the tile, that one block stores
constexpr int PITCH = EXPERTS + 4;     // of a token's sums, so that a warp stores to all banks
constexpr int PRODUCTS = ELEMENT == FP32 ? 3 : 1;
static_assert(SLICE % 4 == 0 && SIZE <= WARPS * 128, "");
typedef float Sums[PRODUCTS][NT][4];

DEVICE float load_as_float(const u8* from, int element) {
  if (element == FP32) return *(const float*)from;
  const u16 bits = *(const u16*)from;
  return element == BF16 ? as_float((u32)bits << 16) : half_float(bits);
}

// d += 16 experts by 8 tokens, of 32 bytes of their rows.
DEVICE void add_product(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  if (ELEMENT == FP32)
    mma_tf32(d, a[0], a[1], a[2], a[3], b[0], b[1]);
  else if (ELEMENT == BF16)
    mma(d, a[0], a[1], a[2], a[3], b[0], b[1]);
  else
    mma_half(d, a[0], a[1], a[2], a[3], b[0], b[1]);
}

// Leaves the nearest tf32 (of the largest numbers, infinity), and returns the rest.
template <int N>
DEVICE void split(u32 (&low)[N], u32 (&number)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    const u32 high = (number[i] + 0x1000u) & 0xFFFFE000u;
    low[i] = __float_as_uint(as_float(number[i]) - as_float(high));
    number[i] = high;
  }
}

// One piece: a thread's 16 bytes of two experts and of each token.
struct Piece {
  uint4 w[2], x[NT];
};

DEVICE void multiply(Sums& sums, const Piece& piece) {
  const auto& [w, x] = piece;
#pragma unroll
  for (int step = 0; step < 2; step++) {
    u32 a[4] = {step ? w[0].z : w[0].x, step ? w[1].z : w[1].x, step ? w[0].w : w[0].y,
                step ? w[1].w : w[1].y};
    u32 low_a[4];
    if (ELEMENT == FP32) split(low_a, a);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      u32 b[2] = {step ? x[n].z : x[n].x, step ? x[n].w : x[n].y}, low_b[2];
      if (ELEMENT == FP32) split(low_b, b);
      add_product(sums[0][n], a, b);
      if (ELEMENT == FP32) {
        add_product(sums[1 % PRODUCTS][n], low_a, b);
        add_product(sums[2 % PRODUCTS][n], a, low_b);
      }
    }
  }
}

DEVICE uint4 from_shared(u32 address) {
  u32 v[4];
  load_shared(v, address);
  return {v[0], v[1], v[2], v[3]};
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
gate_cluster(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(memory);
  // First [PIECES, 2 + NT, threads] of 16 bytes: off lines of 128 bytes they would take twice as long.
  constexpr int STAGE = STAGED ? PIECES * (2 + NT) * WARPS * 32 * 16 : 0;
  float* const parts = (float*)(memory + STAGE);         // [WARPS, TOKENS, PITCH]
  float* const slices = parts + WARPS * TOKENS * PITCH;  // [CLUSTER, SLICE], one from each block
  const u32 all_here = shared_address(slices + SIZE);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int rank = blockIdx.x % CLUSTER, tile = blockIdx.x / CLUSTER;
  const int tiles_e = (a.E + EXPERTS - 1) / EXPERTS;
  const int expert = tile % tiles_e * EXPERTS, token = tile / tiles_e * TOKENS;
  if (warp == 0) {
    if (lane == 0) begin_barrier(all_here, 1);
    barriers_have_begun();
    if (lane == 0) expect(all_here, SIZE * 4);
  }
  arrive_in_cluster();
  const int column = (rank * WARPS + warp) * PIECES * PIECE + t * 16;
  const u8 *w[2], *x[NT];
#pragma unroll
  for (int i = 0; i < 2; i++) w[i] = a.w + min(expert + i * 8 + g, a.E - 1) * a.stride_w + column;
#pragma unroll
  for (int n = 0; n < NT; n++) x[n] = a.x + min(token + n * 8 + g, a.T - 1) * a.stride_x + column;
  const auto inside = [&](int piece) { return column + piece * PIECE < ROW_BYTES; };

  wait_for_previous();
  let_next_begin();
  Sums sums = {};
  if constexpr (STAGED) {
    const u32 stage = shared_address(memory) + threadIdx.x * 16;
    const auto place = [&](int piece, int i) {
      return stage + (piece * (2 + NT) + i) * WARPS * 32 * 16;
    };
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      const bool is = inside(piece);
      const int from = is ? piece * PIECE : 0;
#pragma unroll
      for (int i = 0; i < 2; i++) copy16(place(piece, i), w[i] + from, is);
#pragma unroll
      for (int n = 0; n < NT; n++)
        copy16(place(piece, 2 + n), x[n] + from, is && token + n * 8 + g < a.T);
      commit();
    }
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      wait_groups<PIECES - 1>();
      commit();  // of nothing: the next piece is again the PIECES-th last group
      Piece now;
#pragma unroll
      for (int i = 0; i < 2; i++) now.w[i] = from_shared(place(piece, i));
#pragma unroll
      for (int n = 0; n < NT; n++) now.x[n] = from_shared(place(piece, 2 + n));
      multiply(sums, now);
    }
  } else {
    Piece pieces[AHEAD];
    const auto load = [&](int piece) {
      Piece& to = pieces[piece % AHEAD];
#pragma unroll
      for (int i = 0; i < 2; i++) to.w[i] = load_once(w[i] + piece * PIECE, inside(piece));
#pragma unroll
      for (int n = 0; n < NT; n++) to.x[n] = load_past_l1(x[n] + piece * PIECE, inside(piece));
    };
#pragma unroll
    for (int piece = 0; piece < AHEAD; piece++) load(piece);
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      multiply(sums, pieces[piece % AHEAD]);
      if (piece + AHEAD < PIECES) load(piece + AHEAD);
    }
  }

#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float sum = sums[0][n][i];
      if (ELEMENT == FP32) sum += sums[1 % PRODUCTS][n][i] + sums[2 % PRODUCTS][n][i];
      const int of_token = n * 8 + t * 2 + i % 2;
      parts[(warp * TOKENS + of_token) * PITCH + i / 2 * 8 + g] = sum;
    }
  __syncthreads();
  wait_in_cluster();  // whose barriers have all begun
  const int quad = threadIdx.x * 4;
  if (quad < SIZE) {
    const float* part = parts + quad / EXPERTS * PITCH + quad % EXPERTS;
    float4 sum = *(const float4*)part;
#pragma unroll
    for (int i = 1; i < WARPS; i++) {
      const float4 next = *(const float4*)(part + i * TOKENS * PITCH);
      sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
    }
    const int to = quad / SLICE;
    send(in_block(shared_address(slices + rank * SLICE + quad % SLICE), to), sum,
         in_block(all_here, to));
  }
  if (threadIdx.x >= SLICE) return;
  wait_barrier(all_here, 0);
  float logit = slices[threadIdx.x];
#pragma unroll
  for (int i = 1; i < CLUSTER; i++) logit += slices[i * SLICE + threadIdx.x];
  const int at = rank * SLICE + threadIdx.x, e = expert + at % EXPERTS, row = token + at / EXPERTS;
  if (e >= a.E || row >= a.T) return;
  if (BIAS >= 0) logit += load_as_float(a.bias + e * (BIAS == FP32 ? 4 : 2), BIAS);
  const i64 place = (i64)row * a.E + e;
  if (OUT == FP32)
    ((float*)a.out)[place] = logit;
  else
    ((u16*)a.out)[place] = OUT == BF16 ? float_bf16(logit) : float_half(logit);
}
