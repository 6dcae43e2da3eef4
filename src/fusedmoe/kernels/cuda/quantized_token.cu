// One token on Hopper: both GEMMs of its picks and their weighted sum in one launch, whose quantized
// weights stream once.
//
// out[f] = sum over picks of weight * (w2[expert, f] . act + bias2), act = act(w1[expert] . x +
// bias1). A block on every multiprocessor, all resident (a cooperative launch). A block has
// neighbouring tiles of w1 and its own features of out, of which it has all picks and adds them up
// itself, in their order.
//
// Weights are the M side of mma.m16n8k16: tiles of 16 rows (w1: GATED eight of gate, eight of up; w2:
// eight features of two picks), which KW warps share along the columns, and WM tiles are multiplied
// side by side. A step is an octet, 128 bytes of such rows, which the copy engine brings to a ring of
// the warp's own. That goes on from w1 to w2, so that w2 is there when act is, and no barrier joins
// warps but at the end of either GEMM. Scales and biases of all tiles come beside it.
//
// The N side has eight columns for one token: eight (w2: four of either pick) neighbouring chunks of
// 32 columns have one of their own, x being zero in those of others, and take their scales once.
// Numbers, and x paired to match, are quantized_numbers.cuh's.
//
// act goes through global memory; all blocks meet in between. Their word stays as it is for the next
// launch. Two launches never meet at it: each block has a multiprocessor to itself, so that a launch
// that another stream begins has not all of its blocks before the last one of this has ended.
//
// Other constants come from the launcher as macros; quantized_token.py names them, and the files
// whose text stands before this one.

__device__ u32 meeting;

typedef u32 Columns[8][XR];  // x of an octet's chunks, zero but in their columns

// x of this thread's chunk, the ``own``-th of COUNT from ``first`` on.
template <int COUNT>
DEVICE void spread(Columns& to, int first, const uint4& mine, int own) {
  const u32 words[4] = {mine.x, mine.y, mine.z, mine.w};
  u32 paired[XR];
  pair_up(paired, words);
#pragma unroll
  for (int i = 0; i < COUNT * XR; i++)
    to[first + i / XR][i % XR] = i / XR == own ? paired[i % XR] : 0;
}
// What the zero point of int4 adds to COUNT chunks' sums, taken away.
template <int COUNT>
DEVICE void begin_sums(float (&sum)[4], const Columns& x, int first) {
  sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
  if (ELEMENT != INT4) return;
  const u32 even = 0x80088008u, odd = 0x80808080u;  // -8, as numbers() has it
#pragma unroll
  for (int c = first; c < first + COUNT; c++) {
    mma(sum, even, even, odd, odd, x[c][0], x[c][1]);
    mma(sum, even, even, odd, odd, x[c][XR - 2], x[c][XR - 1]);
  }
}
// An octet of 16 rows, in two chains: of even and odd chunks, or (HALVES) of the first and last four.
template <bool HALVES>
DEVICE void multiply(float (&sums)[2][4], u32 place, const Columns& x) {
  const int lane = threadIdx.x & 31;
  u32 w[4];
#pragma unroll
  for (int c = 0; c < 8; c++) {
    if (c % 2 == 0)
      ldmatrix(w, place + (lane & 15) * 128 + (((c + (lane >> 4)) ^ (lane & 7)) << 4));
    u32 v[2][XR];
#pragma unroll
    for (int half = 0; half < 2; half++) numbers(v[half], w[c % 2 * 2 + half]);
#pragma unroll
    for (int i = 0; i < XR; i += 2)
      mma(sums[HALVES ? c / 4 : c % 2], v[0][i], v[1][i], v[0][i + 1], v[1][i + 1], x[c][i],
          x[c][i + 1]);
  }
}
// Of a chunk, in a row at ``row`` that has so many; columns beyond the last are zero.
template <int SCALES>
DEVICE float scale_of(u32 row, int chunk) {
  return stored_scale(row + min(chunk * CHUNK_COLS / GROUP, SCALES - 1) * SCALE_BYTES);
}

DEVICE void find_live(const Arguments& a, Live& live) {
  const int lane = threadIdx.x & 31;
  const bool weighted = a.pick_weights && lane < a.R;
  const int weight = weighted ? load_past_l1((const int*)a.pick_weights + lane) : 0;
  const int expert = lone_expert(a, lane);
  const u32 all = lanes_with(expert >= 0);
  const int rank = __popc(all & ((1u << lane) - 1));
  if (expert >= 0) {
    live.experts[rank] = expert;
    live.weights[rank] = weighted ? as_float(weight) : 1.0f;
  }
  if (lane == 0) live.count = __popc(all);
}

// Sums of this block's tiles of w1.
DEVICE void up(const Arguments& a, Steps& steps, u32 memory, float* sums) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, first = steps.up_kw * UP_OWN;
  Columns x[UP_OWN];
  float begun[UP_OWN][4];
  uint4 own[UP_OWN];
#pragma unroll
  for (int o = 0; o < UP_OWN; o++) {
    const int column = ((first + o) * 8 + g) * CHUNK_COLS + t * 8;
    own[o] = load_past_l1(a.x + column, column < HIDDEN);
  }
#pragma unroll
  for (int o = 0; o < UP_OWN; o++) {
    spread<8>(x[o], 0, own[o], g);
    begin_sums<8>(begun[o], x[o], 0);
  }
  wait_barrier(memory + BARRIERS_AT, 0);
#pragma unroll 1
  for (int i = steps.up_wm; i < steps.part.tiles; i += UP_WM) {
    float sum[2] = {0.0f, 0.0f};
    steps.wait(UP_OWN);  // so that their chains are side by side
#pragma unroll
    for (int o = 0; o < UP_OWN; o++) {
      float acc[2][4] = {{begun[o][0], begun[o][1], begun[o][2], begun[o][3]}};
      multiply<false>(acc, steps.place(o), x[o]);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const u32 row = memory + UP_SCALES_AT + (i * 16 + up_row(half * 8 + g)) * UP_ROW;
#pragma unroll
        for (int j = 0; j < 2; j++)
          sum[half] = fmaf(scale_of<UP_SCALES>(row, (first + o) * 8 + 2 * t + j),
                           acc[0][half * 2 + j] + acc[1][half * 2 + j], sum[half]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      sum[half] += from_thread(sum[half], 1);
      sum[half] += from_thread(sum[half], 2);
      if (t == 0) sums[(i * UP_KW + steps.up_kw) * 16 + half * 8 + g] = sum[half];
    }
    steps.next(UP_OWN);
  }
}
DEVICE void finish_up(const Arguments& a, const Part& part, const float* sums, const u8* biases) {
  for (int i = threadIdx.x; i < part.tiles * FM; i += WARPS * 32) {
    const int tile = i / FM, own = i % FM;
    float v[SHARDS];
#pragma unroll
    for (int shard = 0; shard < SHARDS; shard++) {
      const float* from = sums + tile * UP_KW * 16 + shard * 8 + own;
      v[shard] = 0.0f;
#pragma unroll
      for (int j = 0; j < UP_KW; j++) v[shard] += from[j * 16];
      const int row = tile * 16 + up_row(shard * 8 + own);
      v[shard] = fmaf(v[shard], UNIT, bias_at<FIRST_BIAS>(biases, row));
    }
    const float value =
        GATED ? gated(v[0], v[SHARDS - 1], a.limit, a.alpha, a.beta) : plain(v[0]);
    // Tiles of picks follow one another, as rows of act do.
    a.act[part.tile * FM + i] = float_bf16(value);
  }
}

// Sums of this block's units, of all pairs.
DEVICE void down(const Arguments& a, Steps& steps, u32 memory, float* sums) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, first = steps.down_kw * DOWN_OWN;
  // Of the pairs whose tiles this warp has, its part of act.
  uint4 own[PAIRS][DOWN_OWN][2];
#pragma unroll
  for (int i = 0; i < PAIRS * DOWN_OWN * 2; i++) {
    const int pair = i / (DOWN_OWN * 2), o = i / 2 % DOWN_OWN, half = i % 2;
    const int rank = 2 * pair + (g >> 2), chunk = (first + o) * 8 + half * 4 + (g & 3);
    const int unit = (steps.down_wm + pair * MOST_UNITS * (DOWN_WM - 1)) % DOWN_WM;  // the first
    const int column = chunk * CHUNK_COLS + t * 8;
    const bool inside =
        unit < steps.part.units && rank < steps.live.count && column < INTERMEDIATE;
    own[pair][o][half] = load_past_l1(a.act + rank * INTERMEDIATE + column, inside);
  }
  wait_barrier(memory + BARRIERS_AT + 8, 0);
  // Two tiles at a time, whose chains are side by side.
#pragma unroll 1
  for (int i = steps.down_wm; i < MOST_UNITS * steps.part.pairs; i += 2 * DOWN_WM) {
    const int odd = t >> 1, two = i + DOWN_WM < MOST_UNITS * steps.part.pairs ? 2 : 1;
    float sum[2];
    steps.wait(two * DOWN_OWN);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int tile = i + (two == 2 ? j : 0) * DOWN_WM;
      const int pair = tile / MOST_UNITS, unit = tile % MOST_UNITS;
      const int rank = min(2 * pair + odd, steps.live.count - 1);
      const u32 row = memory + DOWN_SCALES_AT + ((rank * MOST_UNITS + unit) * 8 + g) * DOWN_ROW;
      sum[j] = 0.0f;
#pragma unroll
      for (int o = 0; o < DOWN_OWN; o++) {
        Columns x;
        float acc[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint4 mine = own[0][o][half];
#pragma unroll
          for (int p = 1; p < PAIRS; p++)
            if (p == pair) mine = own[p][o][half];
          spread<4>(x, half * 4, mine, g & 3);
          begin_sums<4>(acc[half], x, half * 4);
        }
        multiply<true>(acc, steps.place((two == 2 ? j : 0) * DOWN_OWN + o), x);
#pragma unroll
        for (int k = 0; k < 4; k++)
          sum[j] = fmaf(
              scale_of<DOWN_SCALES>(row, (first + o) * 8 + k / 2 * 4 + t % 2 * 2 + k % 2),
              odd ? acc[k / 2][2 + k % 2] : acc[k / 2][k % 2], sum[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      sum[j] += from_thread(sum[j], 1);
      if (t % 2 == 0 && j < two)
        sums[((i + j * DOWN_WM) * DOWN_KW + steps.down_kw) * 16 + odd * 8 + g] = sum[j];
    }
    steps.next(two * DOWN_OWN);
  }
}
DEVICE void finish_down(const Arguments& a, const Live& live, const Part& part, const float* sums,
                        const u8* biases) {
  for (int i = threadIdx.x; i < part.units * 8; i += WARPS * 32) {
    float all = 0.0f;
    for (int rank = 0; rank < live.count; rank++) {
      const float* from = sums + (rank / 2 * MOST_UNITS + i / 8) * DOWN_KW * 16 + rank % 2 * 8 + i % 8;
      float value = 0.0f;
#pragma unroll
      for (int j = 0; j < DOWN_KW; j++) value += from[j * 16];
      value = fmaf(value, UNIT, bias_at<SECOND_BIAS>(biases, rank * MOST_UNITS * 8 + i));
      all = fmaf(live.weights[rank], value, all);
    }
    a.out[part.unit * 8 + i] = float_bf16(all);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
quantized_token(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 memory = shared_address(shared), barriers = memory + BARRIERS_AT;
  float* const sums = (float*)(shared + SUMS_AT);
  Live& live = *(Live*)(shared + LIVE_AT);
  if (lane < STAGES) begin_barrier(barriers + 16 + (warp * STAGES + lane) * 8, 1);
  if (threadIdx.x < 2) begin_barrier(barriers + threadIdx.x * 8, 1);
  if (threadIdx.x == 0) prefetch_map(a.first), prefetch_map(a.second);
  barriers_have_begun();
  wait_for_previous();
  let_next_begin();
  if (warp == 0) find_live(a, live);
  __syncthreads();
  const Part part(live.count);
  const Runs runs{a, live, part, memory};
  Steps steps(a, live, part, memory);
  // In the order in which they are waited for.
  if (lane == 0) runs.up(warp);
  steps.begin();
  if (lane == 0) runs.down(warp);

  up(a, steps, memory, sums);
  __syncthreads();
  finish_up(a, part, sums, shared + UP_BIASES_AT);
  __syncthreads();
  if (threadIdx.x == 0) meet_grid(&meeting);
  __syncthreads();
  down(a, steps, memory, sums);
  __syncthreads();
  finish_down(a, live, part, sums, shared + DOWN_BIASES_AT);
}
