// Two walkers ahead of a warp's products: weights with their scales, and x.

// Rows to the ring. copy16 takes 32 / CPR rows of a step at once, 16 bytes per thread, swizzled so
// that the eight rows of an ldmatrix lie in different banks.
struct Weights {
  static constexpr int CPR = STEP / 16, AT_ONCE = 32 / CPR, PIECES = MT * 16 / AT_ONCE;
  const Place& p;
  const Tasks& tasks;
  u32 ring;
  Walk at;
  const u8* from;         // this thread's piece of the step
  int tile_offset[MT];    // where tiles do not lie one below the other
  i64 first_scale;        // of the expert
  int span = 0, slot = 0;

  DEVICE void aim() {
    if (at.task >= tasks.count) return;
    const int expert = tasks.expert(at.task, EARLY), first = feature(p, at.task, 0);
    const int own = p.lane / CPR * ROW_STRIDE + p.lane % CPR * 16 + at.k * STEP;
    from = tasks.a.weights + expert * (EXPERT_ROWS * ROW_BYTES) + (first * (i64)ROW_STRIDE + own);
    if (FEATURES % FT) {
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
        tile_offset[mt] = (feature(p, at.task, mt) - first) * ROW_STRIDE;
    }
    first_scale = expert * (i64)EXPERT_SCALES;
    span = 0;
  }

  // Eight threads take the 32 bytes of a row from the word on in which a span begins.
  DEVICE void issue_span(u32 to, const u8* base, int unit, bool loose) {
    const int group = first_group(at.k), word = (p.lane & 7) * 4;
    const u8* all = base + (first_scale + group) * unit + word;
#pragma unroll
    for (int i = 0; i < MT * 4; i++) {
      const int row = i * 4 + p.lane / 8;
      const u8* one = all + scale_row(p, at.task, i / 4, row % 16) * (SCALE_STRIDE * unit);
      const int miss = loose ? (int)(u64)one & 3 : 0;
      copy4(to + row * PITCH + word, one - miss, word < (SCALE_STRIDE - group) * unit + miss);
    }
  }

  DEVICE void issue(int stage) {
    if (at.task < tasks.count) {
      const int row = p.lane / CPR, chunk = p.lane % CPR;
      const u32 to = ring + stage * TILE_BYTES + row * STEP;
      const bool inside = ROW_BYTES % STEP == 0 || at.k * STEP + chunk * 16 < ROW_BYTES;
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const int mt = i * AT_ONCE / 16, half = i * AT_ONCE % 16 / 8, rest = i * AT_ONCE % 8;
        const int tile = FEATURES % FT ? tile_offset[mt] : mt * FM * ROW_STRIDE;
        const int swizzle = STEP == 64 ? row >> 1 & 3 : row + i % 2 * 4;
        copy16(to + i * 512 + ((chunk ^ swizzle) << 4),
               from + (tile + half * HALF_OFFSET + rest * ROW_STRIDE), inside);
      }
      if (RINGED) {
        if (span == 0) {
          const u32 spans = ring + STAGES * TILE_BYTES + slot * SPAN_BYTES;
          issue_span(spans, tasks.a.scale, SCALE_BYTES, SCALE_LOOSE);
          if (ZERO) issue_span(spans + SPANS * SPAN_BYTES, tasks.a.zero, 1, ZERO_LOOSE);
          slot = turn(slot, SPANS);
        }
        span = turn(span, SPAN);
      }
      from += STEP;
      if (at.advance(p, tasks)) aim();
    }
    commit();
  }
};

// x of a beat to registers, through the L1, which the warps of a block share.
struct Rows {
  const Place& p;
  const Tasks& tasks;
  Walk at;
  const u16* from[NT];
  u32 x[NT][4][XR];

  DEVICE void find() {
    if (at.task >= tasks.count) return;
    const int block = at.task / TILES;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      // Places without a slot take the block's first, whose sums they then throw away.
      int slot = tasks.a.sorted[block * BN + n * 8 + p.g];
      if (slot < 0 || slot >= tasks.a.R) slot = tasks.a.sorted[block * BN];
      slot = min(max(slot, 0), tasks.a.R - 1);
      from[n] = tasks.a.x + (i64)(slot / TOP_K) * tasks.a.stride_x +
                (at.k * STEP_COLS + p.t * 2 * XR);
    }
  }

  DEVICE void load(int beat) {
    if (at.task >= tasks.count) return;
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int column = beat * BEAT_COLS + c * CHUNK_COLS;
        const u16* one = from[n] + column;
        const bool inside =
            (S - 1) * STEP_COLS + column < COLUMNS || at.k * STEP_COLS + column < COLUMNS;
        if (FOUR) {
          const uint4 v = inside ? *(const uint4*)one : make_uint4(0, 0, 0, 0);
          x[n][c][0] = v.x, x[n][c][1] = v.y, x[n][c][XR - 2] = v.z, x[n][c][XR - 1] = v.w;
        } else {
          const uint2 v = inside ? *(const uint2*)one : make_uint2(0, 0);
          x[n][c][0] = v.x, x[n][c][1] = v.y;
        }
      }
    }
  }

  DEVICE void proceed() {
#pragma unroll
    for (int n = 0; n < NT; n++) from[n] += STEP_COLS;
    if (at.advance(p, tasks)) find();
  }
};
