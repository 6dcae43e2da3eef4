// A few slots per expert on Hopper: one GEMM whose quantized weights stream once, as they are stored.
//
// out[slot, f] = act(x[slot / TOP_K] . w[expert(slot)] + bias). Blocks of slots come from tables.
//
// Weights are the M side of mma.m16n8k16, slots the N side. A warp owns MT tiles of 16 weight rows
// (GATED: eight of gate, eight of up, so that both numbers of a feature meet in one thread) and a
// KW-th of their columns; KW warps share a tile and add up through shared memory. Rows come by
// cp.async into a ring of the warp's own, scales and zero points beside them; the ring never drains
// between tasks, and no barrier but the sum's joins warps. A task is (block of slots, WM * MT tiles
// of rows); tasks go round robin over the blocks of the grid, of which all are resident.
//
// The sum over columns may be taken in any order, so no nibble is moved: the 4 bytes that ldmatrix
// hands a thread count as the columns that the instruction expects of it, and x is paired to match.
// A group's products are summed by themselves and multiplied by the scale in fp32. What 128 + q and
// the zero point of int4 add, a product of x with a constant takes away.
//
// EARLY: the launch before is the first GEMM; weights and tables are read before it has ended. The
// launch that wrote the tables has, because the first GEMM waits for it before it lets this begin.
// Before the first of them numbers that are entries of a TABLE have it in shared memory.
// Other constants come from the launcher as macros; quantized_warps.py names them, and the files
// whose text stands before this one.

// Sums of groups begin with what x takes away.
constexpr bool FROM_SUMS = ELEMENT == INT4 && GC == 1 && !ZERO;

// acc += scale * (part - what zero points add), for one group.
DEVICE void fold(Accumulators& acc, const Accumulators& part, const float (&sums)[NT][4],
                 const Scales& scales, int group) {
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float factor = scales.factor(mt, half, group), zero = scales.zero(mt, half, group);
#pragma unroll
      for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
          float value = part[mt][n][i];
          if (ZERO)
            value = fmaf(zero, sums[n][i], value);
          else if (ELEMENT == INT4 && !FROM_SUMS)
            value += sums[n][i];
          acc[mt][n][i] = fmaf(factor, value, acc[mt][n][i]);
        }
      }
    }
  }
}

// The products of one beat: 64 bytes of this warp's rows in the ring with x, paired already.
DEVICE void multiply(Accumulators& acc, const u32 (&x)[NT][4][XR], const Place& p, u32 tile,
                     int beat, const Scales& scales, int group, u32 table) {
  const int swizzle = STEP == 64 ? p.lane >> 1 & 3 : p.lane & 7;
  Accumulators part;
  float sums[NT][4];  // of x times what takes 128 and the zero point away
  u32 w[MT][4];       // of both halves of the rows, two chunks
#pragma unroll
  for (int c = 0; c < 4; c++) {
    if (c % 2 == 0) {
      const u32 chunk = ((beat * 4 + c + (p.lane >> 4)) ^ swizzle) << 4;
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
        ldmatrix(w[mt], tile + (mt * 16 + (p.lane & 15)) * STEP + chunk);
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      if (FOLD && c % GC == 0) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
      if (ELEMENT == INT4) {
        // -1 or -8, as numbers() has them
        const u32 even = ZERO ? 0x80018001u : 0x80088008u, odd = ZERO ? 0x80108010u : 0x80808080u;
        mma(sums[n], even, even, odd, odd, x[n][c][0], x[n][c][1]);
        mma(sums[n], even, even, odd, odd, x[n][c][XR - 2], x[n][c][XR - 1]);
      }
#pragma unroll
      for (int i = 0; i < MT * 4; i++)
        if (FOLD && c % GC == 0) part[i / 4][n][i % 4] = FROM_SUMS ? sums[n][i % 4] : 0.0f;
    }
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      u32 v[2][XR];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (ELEMENT == TABLE)
          look_up(v[half], w[mt][c % 2 * 2 + half], table);
        else
          numbers(v[half], w[mt][c % 2 * 2 + half]);
        if (SCALED) {
          const int own = group + (beat * 4 + c) * 2 + (p.t >> 1);
          scale_numbers(v[half], shared_u8(scales.at[mt][half] + own));
        }
      }
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float(&sum)[4] = FOLD ? part[mt][n] : acc[mt][n];
        mma(sum, v[0][0], v[1][0], v[0][1], v[1][1], x[n][c][0], x[n][c][1]);
        if (FOUR)
          mma(sum, v[0][XR - 2], v[1][XR - 2], v[0][XR - 1], v[1][XR - 1], x[n][c][XR - 2],
              x[n][c][XR - 1]);
      }
    }
    if (FOLD && (c + 1) % GC == 0) {
      const int column = beat * BEAT_COLS + (c + 1 - GC) * CHUNK_COLS;
      fold(acc, part, sums, scales, group + (ONE_PER_STEP ? 0 : column / WIDTH));
    }
  }
}

// One tile's sums, of eight slots, to the rows of out.
DEVICE void store(const Place& p, const Tasks& tasks, int task, int mt, int n,
                  const float (&v)[4]) {
  const Arguments& a = tasks.a;
  const int block = task / TILES, expert = tasks.expert(task), f = feature(p, task, mt) + p.g;
  float factor[2] = {UNIT, UNIT}, added[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (!RINGED) {
      const int row = scale_row(p, task, mt, p.g + 8 * half);
      factor[half] *= number<SCALE>(bits_at<SCALE>(a.scale, expert * (i64)EXPERT_SCALES + row * SCALE_STRIDE));
    }
    if (SCALE2) factor[half] *= a.scale2[GATED ? expert * 2 + half : expert];
    if (BIAS) {
      const int row = f * ROW_STEP + half * (GATED ? SHARD_STEP : 8 * ROW_STEP);
      added[half] = number<BIAS - 1>(bits_at<BIAS - 1>(a.bias, expert * EXPERT_ROWS + row));
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int slot = a.sorted[block * BN + n * 8 + 2 * p.t + i];
    if (slot < 0 || slot >= a.R) continue;
    const float low = fmaf(v[i], factor[0], added[0]), high = fmaf(v[2 + i], factor[1], added[1]);
    store_features(a, slot, f, low, high);
  }
}

DEVICE void finish(const Place& p, const Tasks& tasks, int task, const Accumulators& acc,
                   float4* parts) {
  add_up<32>(p, acc, parts, p.lane, true, [&](int mt, int n, const float (&v)[4]) {
    store(p, tasks, task, mt, n, v);
  });
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM)
quantized_warps(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(memory);
  const Place p = find_place();
  const u32 table = shared_address(memory) + p.lane * 4;
  const u32 ring = shared_address(memory) + TABLE_BYTES + p.warp * RING_BYTES;
  if (ELEMENT == TABLE) write_table(p, shared_address(memory));
  if (!EARLY) {
    wait_for_previous();
    let_next_begin();
  }
  const Tasks tasks{a, load_past_l1(a.num_post) / BN * TILES};
  int task = blockIdx.x;

  Weights weights{p, tasks, ring, Walk{task, p.k_begin}, a.weights};
  weights.aim();
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; stage++) weights.issue(stage);
  if (EARLY) {
    wait_for_previous();
    let_next_begin();
  }
  Rows rows{p, tasks, Walk{task, p.k_begin}};
  rows.find();
  rows.load(0);

  Accumulators acc;
  Scales scales;
  int stage = 0, parity = 0;
  for (; task < tasks.count; task = tasks.next(task)) {
    clear(acc);
    scales.span = 0;
    for (int k = p.k_begin; k < p.k_end; k++) {
      wait_groups<STAGES - 2>();
      __syncwarp();
      weights.issue(stage == 0 ? STAGES - 1 : stage - 1);  // what the step before has emptied
      if (RINGED) scales.place(p, tasks, task, k, ring + STAGES * TILE_BYTES);
#pragma unroll
      for (int beat = 0; beat < BEATS; beat++) {
        u32 x[NT][4][XR];
#pragma unroll
        for (int i = 0; i < NT * 4; i++) pair_up(x[i / 4][i % 4], rows.x[i / 4][i % 4]);
        if (beat == BEATS - 1) rows.proceed();
        rows.load(beat == BEATS - 1 ? 0 : beat + 1);
        multiply(acc, x, p, ring + stage * TILE_BYTES, beat, scales, first_group(k), table);
      }
      stage = turn(stage, STAGES);
    }
    // Two buffers in turns: whoever writes one again has met the others at the barrier between.
    finish(p, tasks, task, acc, (float4*)(memory + TABLE_BYTES + WARPS * RING_BYTES) + parity);
    parity ^= WARPS * MT * NT * 32;
  }
  wait_groups<0>();
}
