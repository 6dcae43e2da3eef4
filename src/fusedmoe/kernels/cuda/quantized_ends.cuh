// The end of a task: bias, activation, the rows of out.

// What the end of a task needs from global memory, asked for at its beginning.
struct Ends {
  int slots[NT][2];
  u32 scale[MT][2], bias[MT][2];
  float scale2[2];

  DEVICE void load(const Place& p, const Tasks& tasks, int task) {
    const Arguments& a = tasks.a;
    const int expert = tasks.expert(task);
#pragma unroll
    for (int i = 0; i < NT * 2; i++)
      slots[i / 2][i % 2] = LONE ? task / TILES : tasks.slot(task, i / 2 * 8 + 2 * p.t + i % 2);
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
      const int mt = i / 2, half = i % 2;
      const int f = min(feature(p, task, mt) + p.g + (GATED ? 0 : 8 * half), FEATURES - 1);
      const i64 row = scale_row(p, task, mt, p.g + 8 * half);
      if (!RINGED)
        scale[mt][half] =
            bits_at<SCALE>(a.scale, expert * (i64)EXPERT_SCALES + row * SCALE_STRIDE);
      const int own = f * ROW_STEP + (GATED ? half * SHARD_STEP : 0);
      if (BIAS) bias[mt][half] = bits_at<BIAS - 1>(a.bias, expert * EXPERT_ROWS + own);
    }
    if (SCALE2) {
#pragma unroll
      for (int half = 0; half < 2; half++)
        scale2[half] = a.scale2[GATED ? expert * 2 + half : expert];
    }
  }
};

// One tile's sums, of eight slots, to the rows of out.
DEVICE void store(const Place& p, const Arguments& a, int task, const Ends& ends, int mt, int n,
                  const float (&v)[4]) {
  if (LONE && (p.t != 0 || n != 0)) return;
  const int f = feature(p, task, mt) + p.g;
  float factor[2] = {UNIT, UNIT}, added[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (!RINGED) factor[half] *= number<SCALE>(ends.scale[mt][half]);
    if (SCALE2) factor[half] *= ends.scale2[half];
    if (BIAS) added[half] = number<BIAS - 1>(ends.bias[mt][half]);
  }
#pragma unroll
  for (int i = 0; i < (LONE ? 1 : 2); i++) {
    const int slot = ends.slots[n][i];
    if (slot < 0 || slot >= a.R) continue;
    const float low = fmaf(v[i], factor[0], added[0]), high = fmaf(v[2 + i], factor[1], added[1]);
#pragma unroll
    for (int half = 0; half < (GATED ? 1 : 2); half++) {
      const int own = f + half * 8;
      if (own >= FEATURES) continue;
      const float value =
          GATED ? gated(low, high, a.limit, a.alpha, a.beta) : plain(half ? high : low);
      const i64 at = (i64)slot * FEATURES + paired_place(own);
      if (WIDE)
        store_kept((float*)a.out + at, value);
      else
        store_kept((u16*)a.out + at, float_bf16(value * paired_unit(own)));
    }
  }
}
