// One token on Hopper with int4 weights: both GEMMs of its picks and their weighted sum in one launch,
// whose weights stream once.
//
// out[f] = sum over picks of weight * (w2[expert, f] . act + bias2), act = act(w1[expert] . x +
// bias1). A block on every multiprocessor, all resident (a cooperative launch).
//
// Weights are the M side of mma.m16n8k32 in integers: tiles of 16 rows (w1: GATED eight of gate, eight
// of up; w2: eight features of two picks), which KW warps share along the columns, and WM tiles are
// multiplied side by side. A step is an octet, 128 bytes of such rows, which the copy engine brings to
// a ring of the warp's own. That goes on from w1 to w2, so that w2 is there when act is. Scales and
// biases of all tiles come beside it.
//
// The N side has eight columns for one token: both digits of four neighbouring chunks of 32 columns
// (w2: of two, of either pick) have columns of their own, x being zero in those of others, and take
// their scales once.
//
// Constants come from the launcher as macros; quantized_token.py names them, and the files whose text
// stands before this one.

// Sums of this block's tiles of w1.
DEVICE void up(const Runs& runs, Steps& steps, const u8* shared, float* sums) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, first = steps.up_kw * UP_OWN;
  uint2 x[UP_OWN][2];
  Unit units[UP_OWN][2];
#pragma unroll
  for (int i = 0; i < UP_OWN * 2; i++) {
    const int chunk = (first + i / 2) * 8 + i % 2 * 4;
    x[i / 2][i % 2] = digits_at(shared, chunk + g / 2, g % 2);
    units[i / 2][i % 2] = unit_at(shared, chunk + t);
  }
  wait_barrier(runs.memory + BARRIERS_AT, 0);
  if (steps.before == 0) steps.begin_down(runs);
#pragma unroll 1
  for (int i = steps.up_wm; i < steps.part.tiles; i += UP_WM) {
    float sum[2] = {0.0f, 0.0f};
    steps.wait(UP_OWN);  // so that their chains are side by side
    if (i + UP_WM >= steps.part.tiles) steps.begin_down(runs);
#pragma unroll
    for (int j = 0; j < UP_OWN * 2; j++) {
      const int o = j / 2, half = j % 2;
      IntegerSums own(units[o][half].begin);
#pragma unroll
      for (int p = 0; p < 2; p++)
        own.add(steps.place(o), half * 2 + p, x[o][half], g / 2 == 2 * p, g / 2 == 2 * p + 1);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const u32 row = runs.memory + UP_SCALES_AT + (i * 16 + up_row(r * 8 + g)) * UP_ROW;
        const float scale = scale_of<UP_SCALES>(row, (first + o) * 8 + half * 4 + t);
        sum[r] = fmaf(scale * units[o][half].factor, own.of_row(r), sum[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sum[r] += from_thread(sum[r], 1);
      sum[r] += from_thread(sum[r], 2);
      if (t == 0) sums[(i * UP_KW + steps.up_kw) * 16 + r * 8 + g] = sum[r];
    }
    steps.next(UP_OWN);
  }
}

// Sums of this block's units, of all pairs.
DEVICE void down(Steps& steps, u32 memory, const u8* shared, float* sums) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, first = steps.down_kw * DOWN_OWN;
  const int live = steps.live.count, tiles = MOST_UNITS * steps.part.pairs;
  wait_barrier(memory + BARRIERS_AT + 8, 0);
  // Two tiles at a time, whose chains are side by side.
#pragma unroll 1
  for (int i = steps.down_wm; i < tiles; i += 2 * DOWN_WM) {
    const int odd = t >> 1, two = i + DOWN_WM < tiles ? 2 : 1;
    float sum[2];
    steps.wait(two * DOWN_OWN);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int tile = i + (two == 2 ? j : 0) * DOWN_WM;
      const int pair = tile / MOST_UNITS, unit = tile % MOST_UNITS;
      // This thread's column of x, its column of sums.
      const int given = min(2 * pair + g / 4, PICKS - 1), rank = min(2 * pair + odd, live - 1);
      const u32 row = memory + DOWN_SCALES_AT + ((rank * MOST_UNITS + unit) * 8 + g) * DOWN_ROW;
      sum[j] = 0.0f;
#pragma unroll
      for (int o = 0; o < DOWN_OWN; o++) {
        const u32 place = steps.place((two == 2 ? j : 0) * DOWN_OWN + o);
#pragma unroll
        for (int p = 0; p < 4; p++) {
          const int chunk = (first + o) * 8 + p * 2;
          const uint2 mine = digits_at(shared, given * ACT_CHUNKS + chunk + g / 2 % 2, g % 2);
          const Unit own_unit = unit_at(shared, rank * ACT_CHUNKS + chunk + t % 2);
          IntegerSums own(own_unit.begin);
          own.add(place, p, mine, g / 2 % 2 == 0, g / 2 % 2 == 1);
          const float scale = scale_of<DOWN_SCALES>(row, chunk + t % 2);
          sum[j] = fmaf(scale * own_unit.factor, odd ? own.of_row(1) : own.of_row(0), sum[j]);
        }
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

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
quantized_token(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 memory = shared_address(shared), barriers = memory + BARRIERS_AT;
  float* const sums = (float*)(shared + SUMS_AT);
  Live& live = *(Live*)(shared + LIVE_AT);
  if (lane < STAGES) begin_barrier(memory + RING_BARRIERS_AT + (warp * STAGES + lane) * 8, 1);
  if (threadIdx.x < 2) begin_barrier(barriers + threadIdx.x * 8, 1);
  if (threadIdx.x == 0) prefetch_map(a.first), prefetch_map(a.second);
  barriers_have_begun();
  wait_for_previous();
  let_next_begin();
  const Digits<1, X_CHUNKS, HIDDEN> of_x(a.x, 1);  // it would come behind weights
  if (warp == 0) find_live(a, live);
  meet_warps();
  const Part part(live.count);
  const Runs runs{a, live, part, memory};
  Steps steps(a, live, part, memory);
  if (lane == 0) runs.up(warp);
  steps.begin_tile();
  of_x.make(shared);
  meet_warps();
  steps.begin_others();
  up(runs, steps, shared, sums);
  finish_up(a, part, sums, shared + UP_BIASES_AT);
  Digits<PICKS, ACT_CHUNKS, INTERMEDIATE>(a.act, live.count).make(shared);
  meet_warps();
  down(steps, memory, shared, sums);
  finish_down(a, live, part, sums, shared + DOWN_BIASES_AT);
}
