// One token on Hopper with mxfp4 weights: both GEMMs of its picks and their weighted sum in one
// launch, whose weights stream once, whole rows at a time.
//
// out[f] = sum over picks of weight * (w2[expert, f] . act + bias2), act = act(w1[expert] . x +
// bias1). A block on every multiprocessor, all resident (a cooperative launch).
//
// Weights are the M side of mma.m16n8k16: tiles of 16 rows (w1: as they lie in memory; w2: eight
// features of two picks), an octet of whose columns each of WARPS warps multiplies. One more asks for
// tiles by bulk copies, from w1 on to w2, so that w2 is there when act is. Scales and biases of all
// tiles come beside them.
//
// The N side has eight columns for one token: the chunks of 32 columns of an octet (w2: four of either
// pick) have one of their own, x being zero in those of others, and take their scales once. Columns
// beyond a row are those of the next one, or whatever comes; numbers of e2m1 are finite, and x is zero.
//
// Constants come from the launcher as macros; quantized_token.py names them, and the files whose text
// stands before this one.

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
// This warp's octet of 16 rows of so many bytes, in two chains: of even and odd chunks, or (HALVES) of
// the first and last four.
template <bool HALVES, int BYTES>
DEVICE void multiply(float (&sums)[2][4], u32 place, const Columns& x) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 own = place + (lane & 15) * BYTES + (lane >> 4) * 16 + warp * OCTET_BYTES;
  u32 w[4];
#pragma unroll
  for (int i = 0; i < 8; i++) sums[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int c = 0; c < 8; c++) {
    if (c % 2 == 0) ldmatrix(w, own + c * 16);
    u32 v[2][XR];
#pragma unroll
    for (int half = 0; half < 2; half++) numbers(v[half], w[c % 2 * 2 + half]);
#pragma unroll
    for (int i = 0; i < XR; i += 2)
      mma(sums[HALVES ? c / 4 : c % 2], v[0][i], v[1][i], v[0][i + 1], v[1][i + 1], x[c][i],
          x[c][i + 1]);
  }
}

// Sums of this block's tiles of w1.
DEVICE void up(const Arguments& a, const Part& part, const Ring& ring, float* sums) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int column = threadIdx.x * 8;
  Columns x;
  spread<8>(x, 0, load_past_l1(a.x + column, column < HIDDEN), g);
  wait_barrier(ring.memory + BARRIERS_AT, 0);
#pragma unroll 1
  for (int step = 0; step < part.tiles; step++) {
    ring.wait(step);
    float acc[2][4];
    multiply<false, UP_BYTES>(acc, ring.place(step), x);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 row = ring.memory + UP_SCALES_AT + (step * 16 + half * 8 + g) * UP_ROW;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 2; i++)
        sum = fmaf(scale_of<UP_SCALES>(row, warp * 8 + 2 * t + i),
                   acc[0][half * 2 + i] + acc[1][half * 2 + i], sum);
      sum += from_thread(sum, 1);
      sum += from_thread(sum, 2);
      if (t == 0) sums[(step * WARPS + warp) * 16 + half * 8 + g] = sum;
    }
    ring.give_back(step);
  }
}

// Sums of this block's units, of all pairs.
DEVICE void down(const Arguments& a, const Live& live, const Part& part, const Ring& ring,
                 float* sums) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  uint4 own[PAIRS][2];
#pragma unroll
  for (int i = 0; i < PAIRS * 2; i++) {
    const int rank = i / 2 * 2 + g / 4, chunk = (warp * 2 + i % 2) * 4 + g % 4;
    const int column = chunk * CHUNK_COLS + t * 8;
    own[i / 2][i % 2] = load_past_l1(a.act + rank * INTERMEDIATE + column,
                                     rank < live.count && column < INTERMEDIATE);
  }
  wait_barrier(ring.memory + BARRIERS_AT + 8, 0);
  int step = part.tiles;
#pragma unroll
  for (int pair = 0; pair < PAIRS; pair++) {
    if (pair >= part.pairs) break;
    Columns x;
#pragma unroll
    for (int half = 0; half < 2; half++) spread<4>(x, half * 4, own[pair][half], g % 4);
    const int odd = t >> 1, rank = min(2 * pair + odd, live.count - 1);
#pragma unroll 1
    for (int unit = 0; unit < part.units; unit++, step++) {
      ring.wait(step);
      float acc[2][4], sum = 0.0f;
      multiply<true, DOWN_BYTES>(acc, ring.place(step), x);
      const u32 row =
          ring.memory + DOWN_SCALES_AT + ((rank * MOST_UNITS + unit) * 8 + g) * DOWN_ROW;
#pragma unroll
      for (int i = 0; i < 4; i++)
        sum = fmaf(scale_of<DOWN_SCALES>(row, warp * 8 + i / 2 * 4 + t % 2 * 2 + i % 2),
                   odd ? acc[i / 2][2 + i % 2] : acc[i / 2][i % 2], sum);
      sum += from_thread(sum, 1);
      if (t % 2 == 0)
        sums[((pair * MOST_UNITS + unit) * WARPS + warp) * 16 + odd * 8 + g] = sum;
      ring.give_back(step);
    }
  }
}

extern "C" __global__ void __launch_bounds__((WARPS + 1) * 32, 1)
quantized_token_rows(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 memory = shared_address(shared);
  const Ring ring{memory};
  float* const sums = (float*)(shared + SUMS_AT);
  Live& live = *(Live*)(shared + LIVE_AT);
  ring.begin();
  if (threadIdx.x < 2) begin_barrier(memory + BARRIERS_AT + threadIdx.x * 8, 1);
  barriers_have_begun();
  wait_for_previous();
  let_next_begin();
  if (warp == 0) find_live(a, live);
  __syncthreads();
  const Part part(live.count);
  if (warp == WARPS) {
    const Bringer bringer{a, live, part, ring};
    if (lane == 0) bringer.up(), bringer.down();
    return;
  }
  const Runs runs{a, live, part, memory};
  if (lane == 0) runs.up(warp), runs.down(warp);
  __syncwarp();
  up(a, part, ring, sums);
  finish_up(a, part, sums, shared + UP_BIASES_AT);
  down(a, live, part, ring, sums);
  finish_down(a, live, part, sums, shared + DOWN_BIASES_AT);
}
